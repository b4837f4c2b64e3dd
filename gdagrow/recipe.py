"""What a user asks for: a growth of every axis, how copies are told apart, what becomes of tied embeddings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gdagrow.choices import DEFAULT_SNR_DB
from gdagrow.depth import Placement, parse_placement
from gdagrow.errors import RecipeError
from gdagrow.heads import MAX_COPIES, Ratio
from gdagrow.plain_yaml import read_yaml

WIDTH_AXES = ("signal", "noise", "kv", "hidden", "ffn")

_MAX_SIZE = 2**31 - 1


def _factor(value: Any) -> int:
    """Accept a whole number from 1 to `MAX_COPIES`, also as the text a command line gives."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,6}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COPIES:
        raise ValueError(f"expected a whole number from 1 to {MAX_COPIES}, got {value!r}")
    return value


def _signal(value: Any) -> int | Ratio:
    """Accept a factor, or a target ratio such as `4:1`."""
    if isinstance(value, Ratio):
        return value
    if isinstance(value, str) and ":" in value:
        return parse_ratio(value)
    return _factor(value)


def parse_ratio(text: str) -> Ratio:
    """Read a target ratio such as `4:1`.

    Raises:
        RecipeError: it is not one.
    """
    found = re.fullmatch(r"0*([1-9]\d{0,5}):1", text)
    if not found:
        raise RecipeError(f"expected a target ratio R:1 with a whole R of 1 or more, such as 4:1, got {text!r}")
    if int(found.group(1)) > MAX_COPIES:
        raise RecipeError(f"expected a target ratio of at most {MAX_COPIES}:1, got {text!r}")
    return Ratio(int(found.group(1)))


def _size(value: Any) -> int:
    """Accept a size of an axis, or a number of layers, also as the text a command line gives."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"expected a whole number from 1 to {_MAX_SIZE}, got {value!r}")
    return value


def _no_boolean(value: Any) -> Any:
    """Leave a number to pydantic, which would take `true` for 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value!r}")
    return value


def _more_layers(value: Any) -> int:
    """Accept a number of layers to add, as `+8` or `8`."""
    return _size(value.removeprefix("+") if isinstance(value, str) else value)


def _placement(value: Any) -> Placement:
    if isinstance(value, str):
        return parse_placement(value)
    if not isinstance(value, Placement):
        raise ValueError(f"expected even, top, bottom or after:3,7,11, got {value!r}")
    return value


def _selection(value: Any) -> str:
    """Accept `first`, `norm` or `given:FILE`."""
    if not isinstance(value, str) or not re.fullmatch(r"first|norm|given:.+", value):
        raise ValueError(f"expected first, norm or given:FILE, got {value!r}")
    return value


Factor = Annotated[int, BeforeValidator(_factor)]
Signal = Annotated[int | Ratio, BeforeValidator(_signal)]
Size = Annotated[int, BeforeValidator(_size)]


class Recipe(BaseModel):
    """A growth, immutable.

    signal: How often each signal head is cloned, or a target ratio `R:1`.
    select: Which signal heads a target ratio clones once more than others: the `first` of each group, those with the
        largest `norm` (`gdagrow.selection`), or as a file says (`given:FILE`).
    noise, kv, hidden, ffn: Whole factors for noise heads, KV groups, the residual width and the FFN width.
    hidden_to, ffn_to: Sizes of the last two instead, which need not be multiples.
    uniform: One factor for all five: the HyperCloning baseline; stands alone among them.
    depth, layers: New blocks to add, or how many layers there shall be.
    insert: Where new blocks go; by default evenly.
    like: Another model, whose sizes are to be reached: a directory, a `config.json`, or a name (`gdagrow.targets`).
    rope_theta: Another base of RoPE, which changes the function.
    max_position_embeddings: What the config shall say of the context.
    to: The layout to convert to before anything grows, or None to keep the source's.
    embeddings: What becomes of tied embeddings: `keep` the tie (the final norm then carries the split) or `untie`.
    exact_copies: Leave copies identical; they then stay identical for ever in training.
    snr_db: How far below the weights the zero-sum noise lies that parts copies, in decibels; up to 20 (10%).
    seed: Seed of that noise, and of weights that are free.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    signal: Signal = 1
    select: Annotated[str, BeforeValidator(_selection)] | None = None
    noise: Factor = 1
    kv: Factor = 1
    hidden: Factor = 1
    ffn: Factor = 1
    hidden_to: Size | None = None
    ffn_to: Size | None = None
    uniform: Factor = 1
    depth: Annotated[int, BeforeValidator(_more_layers)] | None = None
    layers: Size | None = None
    insert: Annotated[Placement, BeforeValidator(_placement)] | None = None
    like: Annotated[str, Field(min_length=1)] | None = None
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_boolean)] | None = None
    max_position_embeddings: Size | None = None
    to: Literal["motif"] | None = None
    embeddings: Literal["keep", "untie"] | None = None
    exact_copies: bool = False
    snr_db: Annotated[float, Field(ge=20.0, le=120.0)] = DEFAULT_SNR_DB
    seed: Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_no_boolean)] = 0

    @model_validator(mode="before")
    @classmethod
    def _no_head_dim(cls, data: Any) -> Any:
        if isinstance(data, dict) and "head_dim" in data:
            raise ValueError(
                "head_dim cannot grow: the softmax scale and the RoPE frequencies depend on it, so no rescaling of "
                "weights preserves the function; grow signal, noise, kv, hidden or ffn instead"
            )
        return data

    @model_validator(mode="after")
    def _says_each_thing_once(self) -> "Recipe":
        widths = [axis for axis in WIDTH_AXES if getattr(self, axis) != 1]
        widths += [key for key in ("hidden_to", "ffn_to") if getattr(self, key) is not None]
        deeper = [key for key in ("depth", "layers") if getattr(self, key) is not None]
        if self.uniform != 1 and widths:
            raise ValueError(f"uniform grows all five axes and stands alone; remove {', '.join(widths)} or uniform")
        if told := [axis for axis in ("hidden", "ffn") if {axis, f"{axis}_to"} <= set(widths)]:
            raise ValueError(f"{told[0]} and {told[0]}_to both say how wide it shall be; give one of them")
        if len(deeper) == 2:
            raise ValueError("depth and layers both say how many layers there shall be; give one of them")
        sizes = ["uniform"] * (self.uniform != 1) + widths + deeper
        if self.like is not None and sizes:
            raise ValueError(f"like says all sizes; remove {', '.join(sizes)} or like")
        if self.insert is not None and self.insert.where != "after" and not deeper and self.like is None:
            raise ValueError(f"insert {self.insert}: how many new blocks? add depth: 8, or layers: 40")
        if self.select is not None and self.like is None and not isinstance(self.signal, Ratio):
            raise ValueError(
                "select says which signal heads a target ratio clones once more than others; give a ratio, such as "
                "signal: 4:1, or leave it out"
            )
        others = (self.insert, self.like, self.to, self.rope_theta, self.max_position_embeddings)
        if not sizes and self.embeddings != "untie" and all(other is None for other in others):
            raise ValueError("no growth asked for; give at least one factor above 1, such as --signal-x2 or signal: 2")
        return self

    def factor(self, axis: str) -> int | Ratio:
        """What the recipe asks of one of the five width axes."""
        value: int | Ratio = getattr(self, axis)
        return value if self.uniform == 1 else self.uniform

    @property
    def label(self) -> str:
        """A short name of the growth, for the default output directory: `signal-x2`, `to-motif-ratio-4to1`."""
        parts = [f"to-{self.to}"] * (self.to is not None) + [f"uniform-x{self.uniform}"] * (self.uniform != 1)
        if isinstance(self.signal, Ratio):
            parts.append(f"ratio-{self.signal.signal}to1")
            parts += ["by-norm"] * (self.select == "norm") + ["given"] * (self.select or "").startswith("given:")
        elif self.signal != 1:
            parts.append(f"signal-x{self.signal}")
        parts += [f"{axis}-x{getattr(self, axis)}" for axis in WIDTH_AXES[1:] if getattr(self, axis) != 1]
        parts += [f"{axis}-{size}" for axis in ("hidden", "ffn") if (size := getattr(self, f"{axis}_to")) is not None]
        if self.layers is not None:
            parts.append(f"layers-{self.layers}")
        elif self.depth is not None or self.insert is not None:
            parts.append(f"depth-plus-{self.depth or len(self.insert.layers if self.insert else ())}")
        if self.insert is not None and self.insert.where != "even":
            parts.append("-".join((self.insert.where, *map(str, self.insert.layers))))
        if self.rope_theta is not None:
            parts.append(f"theta-{self.rope_theta:.15g}")
        if self.max_position_embeddings is not None:
            parts.append(f"context-{self.max_position_embeddings}")
        return "-".join(parts + ["untied"] * (self.embeddings == "untie"))

    def as_dict(self) -> dict[str, Any]:
        """What was asked for, without what was left at its default; `make_recipe` reads it back."""
        return {key: str(value) if isinstance(value, Ratio | Placement) else value
                for key in sorted(self.model_fields_set) if (value := getattr(self, key)) is not None}  # fmt: skip


def make_recipe(values: dict[str, Any], origin: str = "growth", flags: Mapping[str, str] | None = None) -> Recipe:
    """Validate a growth.

    Args:
        values: The fields of `Recipe`.
        origin: Where they come from, for the error: a file name, or "growth" for command-line flags.
        flags: The fields that come from a flag instead, and the flag, which the error then names.

    Raises:
        RecipeError: every field that is wrong, in one sentence.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        flags = flags or {}
        by_flag = [item for item in error.errors() if item["loc"] and item["loc"][0] in flags]
        others = [_told(item) for item in error.errors() if item not in by_flag]
        told = [_told(item, flags[str(item["loc"][0])]) for item in by_flag]
        raise RecipeError("; ".join(told + [f"{origin}: " + "; ".join(others)] * bool(others))) from None


def _told(item: Any, where: str = "") -> str:
    where = where or ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where!r}, expected one of {', '.join(Recipe.model_fields)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {item['input']!r}"
    return f"{where}: {message}" if where else str(message)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the fields of a recipe from a YAML 1.2 file, in which `4:1` is text and a key stands once.

    Raises:
        RecipeError: the file cannot be read or is not a YAML mapping; `make_recipe` judges the fields.
    """
    values = read_yaml(path, f"recipe {path}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(
            f"recipe {path}: expected keys with values, such as 'signal: 2' for a growth, got {type(values).__name__}"
        )
    return values
