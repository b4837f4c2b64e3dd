"""What a user asks of a training run: one frozen recipe, read from YAML, every mistake in one sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from gdagrow.errors import RecipeError
from gdagrow.recipe import Recipe as Growth
from gdagrow.recipe import make_recipe, read_recipe

# What a run that goes on must have as it was begun; anything else in its recipe may be changed meanwhile.
FIXED = ("model", "data", "context_length", "batch_size", "seed")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _layers(value: Any) -> Any:
    """Accept `old`, or a list of layers."""
    whole = isinstance(value, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if value != "old" and not (whole and all(layer >= 0 for layer in value)):
        raise ValueError(f"expected old, or a list of layers counted from 0, got {value!r}")
    return value if value == "old" else tuple(value)


Paths = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Count = Annotated[int, Field(ge=1, strict=True)]
Steps = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(_Strict):
    """Where the model comes from: a checkpoint directory, or sizes.

    directory: With `config.json` and safetensors weights, as any trainer or `gdagrow expand` leaves it.
    config: The keys of a Motif `config.json`; weights are drawn with the run's seed.
    """

    directory: Path | None = None
    config: Mapping[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> "ModelSource":
        if (self.directory is None) == (self.config is None):
            raise ValueError("expected either directory (of a checkpoint) or config (keys of a config.json)")
        return self


class DataSource(_Strict):
    """The text to train on.

    train, evaluation: Files or globs: text as it is, `.jsonl` and `.parquet` with a text in each row, or tokens in
        `.bin` and `.npy`; `{stdlib}` in a path stands for Python's own library. Without `evaluation` the end of `train`
        is held out, as much as `held_out` says.
    held_out: That share of the training tokens.
    tokenizer: `bytes` (one token a byte), or a directory with `tokenizer.json`.
    text_key: The column of JSONL and parquet that has the text.
    token_dtype: What `.bin` files consist of.
    """

    train: Paths
    evaluation: Paths | None = None
    held_out: Share = 0.0
    tokenizer: str = "bytes"
    text_key: str = "text"
    token_dtype: Literal["uint16", "uint32"] = "uint16"

    @model_validator(mode="after")
    def _one_held_out(self) -> "DataSource":
        if self.evaluation and self.held_out:
            raise ValueError("evaluation and held_out both say what to evaluate on; give one of them")
        return self


class OptimizerSettings(_Strict):
    """Torch's own AdamW, SGD, or Muon for the matrices of the layers with AdamW for all else.

    betas, eps: Of AdamW. momentum: Of SGD and Muon. weight_decay: Of matrices alone.
    max_grad_norm: Gradients are clipped to this norm; 0 for not at all.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    learning_rate: Positive
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    momentum: Share = 0.95
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _only_its_own(self) -> "OptimizerSettings":
        others = {"adamw": ("momentum",), "sgd": ("betas", "eps"), "muon": ()}[self.name]
        if wrong := [key for key in others if key in self.model_fields_set]:
            raise ValueError(f"{self.name} has no {', '.join(wrong)}; leave it out")
        return self


class Schedule(_Strict):
    """The learning rate over the steps: up from 0 within `warm_up` steps, then down to `final` times the peak.

    kind: `wsd` (warm up, stay, decay) stays at the peak and goes down linearly in the last `decay` steps, so that runs
        of any length are the same until there: a growth is tried on several continuations of one run.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warm_up: Steps = 0
    decay: Count | None = None
    final: Annotated[float, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> "Schedule":
        if (self.kind == "wsd") != (self.decay is not None):
            raise ValueError(f"decay, in steps, goes with kind wsd and with no other, got kind {self.kind}")
        return self


class Freeze(_Strict):
    """What is kept as it is for `steps` steps, from the start of the run or from a growth.

    layers: Whole blocks by index, or `old` for all that there were before the last growth added some.
    heads: `old` for the first copy of every cloned head.
    """

    layers: Annotated[tuple[int, ...] | Literal["old"], BeforeValidator(_layers)] = ()
    heads: Literal["old"] | None = None
    steps: Count

    @model_validator(mode="after")
    def _something(self) -> "Freeze":
        if not self.layers and self.heads is None:
            raise ValueError("nothing to freeze; give layers: [0, 1, ...], layers: old or heads: old")
        return self

    @property
    def asks_for_old(self) -> bool:
        """Whether the last growth says what is kept."""
        return self.heads == "old" or self.layers == "old"


class MidRunGrowth(_Strict):
    """A growth after step `at`.

    expand: The fields of `gdagrow expand --recipe`, or a file with them.
    moments: What becomes of the optimizer's moments: carried where that is exact (`auto`), everywhere, or reset.
    schedule: Go on with the learning rate where it is (`keep`), or begin the schedule anew for the steps left.
    rewarm_up: Steps in which the learning rate comes up from 0 after the growth; `auto` as growth.json proposes.
    freeze: What to keep as it is for a while.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    at: Count
    expand: Growth
    moments: Literal["auto", "carry", "reset"] = "auto"
    schedule: Literal["keep", "restart"] = "keep"
    rewarm_up: Steps | Literal["auto"] = "auto"
    freeze: Freeze | None = None

    @field_validator("expand", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            return make_recipe(read_recipe(Path(value)), f"recipe {value}")
        return make_recipe(value) if isinstance(value, dict) else value


class TrainRecipe(_Strict):
    """A training run, immutable.

    context_length: Tokens of a sequence. batch_size: Sequences of an optimizer step, over all processes together.
    micro_batch_size: Sequences that one process computes at once; what is left of a batch is accumulated. By default a
        process's whole share.
    precision: `bf16` computes in bfloat16 and keeps weights and moments in float32; `fp32` does all in float32.
    save_every, keep: A checkpoint every so many steps, of which the last `keep` stay.
    evaluate_every, evaluate_on: Held-out loss every so many steps (0: at the end alone), on at most so many sequences.
    multipliers: Apply the learning-rate multipliers of growth.json; if left out, with adamw, which they are for.
    health_every: Look at clones, lambdas and gradients every so many steps; 0 for never.
    seed: Of new weights and of the order of the data.
    """

    model: ModelSource
    data: DataSource
    context_length: Annotated[int, Field(ge=2, strict=True)]
    batch_size: Count
    micro_batch_size: Count | None = None
    steps: Count
    optimizer: OptimizerSettings
    schedule: Schedule = Schedule()
    precision: Literal["bf16", "fp32"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: Count = 1000
    keep: Count = 2
    evaluate_every: Steps = 0
    evaluate_on: Count = 256
    log_every: Count = 10
    multipliers: bool | None = None
    growth: tuple[MidRunGrowth, ...] = ()
    freeze: Freeze | None = None
    health_every: Steps = 0
    device: Literal["auto", "cpu"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "TrainRecipe":
        at = [growth.at for growth in self.growth]
        if at != sorted(set(at)):
            raise ValueError(f"growth: expected steps in ascending order, each once, got {at}")
        if at and at[-1] >= self.steps:
            raise ValueError(f"growth: step {at[-1]} is not before the last one, {self.steps}; grow earlier")
        if self.freeze and self.freeze.asks_for_old and self.model.directory is None:
            raise ValueError(
                "freeze: a model of new weights has no old heads or layers; freeze them in a growth, or layers by index"
            )
        if self.multipliers and self.optimizer.name != "adamw":
            raise ValueError("multipliers are for adamw, whose step does not shrink with the gradient; leave them out")
        return self

    @property
    def scales_rates(self) -> bool:
        """Whether a grown model's parameters get the learning rates that growth.json suggests."""
        return self.optimizer.name == "adamw" if self.multipliers is None else self.multipliers

    @property
    def evaluates(self) -> bool:
        """Whether something is held out."""
        return self.data.evaluation is not None or self.data.held_out > 0

    def as_dict(self) -> dict[str, Any]:
        """What was asked for, without what was left at its default, for YAML; `make_train_recipe` reads it back."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Growth):
        return value.as_dict()
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {key: _plain(getattr(value, key)) for key in fields if key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_train_recipe(path: Path) -> TrainRecipe:
    """Read a recipe from a YAML file.

    Raises:
        RecipeError: it cannot be read, or is no recipe: every field that is wrong, in one sentence.
    """
    return make_train_recipe(read_recipe(path), f"recipe {path}")


def make_train_recipe(values: Mapping[str, Any], origin: str) -> TrainRecipe:
    """Validate the fields of a recipe; `origin` says where they come from.

    Raises:
        RecipeError: every field that is wrong, in one sentence.
    """
    try:
        return TrainRecipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: " + "; ".join(told_mistake(item) for item in error.errors())) from None


def told_mistake(item: Any) -> str:
    """What pydantic found wrong, in words."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {where!r}, which no part of such a recipe has"
    if item["type"] == "missing":
        return f"{where} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {item['input']!r}"
    return f"{where}: {message}" if where else str(message)
