"""What a user asks for: a growth of every axis, how copies are told apart, what becomes of tied embeddings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gdagrow.errors import RecipeError
from gdagrow.heads import MAX_COPIES, Ratio

WIDTH_AXES = ("signal", "noise", "kv", "hidden", "ffn")

# The default noise is 40 dB below the weights (1% of each, in amplitude): just above the grid of bf16 (0.4 to 0.8%),
# the coarsest stored dtype, so copies part there too; enough to part all of them (tests/numerics/test_symmetry.py).
DEFAULT_SNR_DB = 40.0


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


Factor = Annotated[int, BeforeValidator(_factor)]
Signal = Annotated[int | Ratio, BeforeValidator(_signal)]


class Recipe(BaseModel):
    """A growth, immutable.

    signal: How often each signal head is cloned, or a target ratio `R:1`.
    noise, kv, hidden, ffn: Whole factors for noise heads, KV groups, the residual width and the FFN width.
    uniform: One factor for all five: the HyperCloning baseline; stands alone.
    to: The layout to convert to before anything grows, or None to keep the source's.
    embeddings: What becomes of tied embeddings: `keep` the tie (the final norm then carries the split) or `untie`.
    exact_copies: Leave copies identical; they then stay identical for ever in training.
    snr_db: How far below the weights the zero-sum noise lies that parts copies, in decibels; up to 20 (10%).
    seed: Seed of that noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    signal: Signal = 1
    noise: Factor = 1
    kv: Factor = 1
    hidden: Factor = 1
    ffn: Factor = 1
    uniform: Factor = 1
    to: Literal["motif"] | None = None
    embeddings: Literal["keep", "untie"] | None = None
    exact_copies: bool = False
    snr_db: Annotated[float, Field(ge=20.0, le=120.0)] = DEFAULT_SNR_DB
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0

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
    def _something_to_do(self) -> "Recipe":
        asked = [axis for axis in WIDTH_AXES if getattr(self, axis) != 1]
        if self.uniform != 1 and asked:
            raise ValueError(f"uniform grows all five axes and stands alone; remove {', '.join(asked)} or uniform")
        if self.uniform == 1 and not asked and self.embeddings != "untie" and self.to is None:
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
        elif self.signal != 1:
            parts.append(f"signal-x{self.signal}")
        parts += [f"{axis}-x{getattr(self, axis)}" for axis in WIDTH_AXES[1:] if getattr(self, axis) != 1]
        return "-".join(parts + ["untied"] * (self.embeddings == "untie"))

    def as_dict(self) -> dict[str, Any]:
        """What was asked for, without what was left at its default; `make_recipe` reads it back."""
        return {key: str(value) if isinstance(value, Ratio) else value
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
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        with path.open(encoding="utf-8") as file:
            values = YAML(typ="safe", pure=True).load(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"recipe {path}: cannot be read: {reason}") from None
    except (YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()[:40])
        raise RecipeError(f"recipe {path}: not YAML: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(
            f"recipe {path}: expected keys with values, such as 'signal: 2' for a growth, got {type(values).__name__}"
        )
    return values
