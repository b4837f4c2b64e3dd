"""What a run would be and take, by arithmetic on shapes: nothing is read but headers, nothing is set aside."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from gdagrow.archs import Sizes, trained_of
from gdagrow.archs.llama import Llama
from gdagrow.costs import ModelFigures, checkpoint_figures
from gdagrow.errors import TrainError
from gdagrow.header import Header
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.targets.like import with_derived_sizes
from gdagrow.train.configs import header_of, header_of_config
from gdagrow.train.recipe import MidRunGrowth, TrainRecipe

# Forward once, backward twice over.
_PASSES: Final = 3
_KEPT_BYTES: Final = 4
_COMPUTED_BYTES: Final = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes in one process; `activations` and `logits` are estimates, the others are sizes."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Leg:
    """Steps `(begin, end]` of a run, between growths.

    flops_per_step: Of all processes: matrix products and attention, forward and backward.
    """

    begin: int
    end: int
    model: ModelFigures
    memory: Memory
    flops_per_step: int


@dataclass(frozen=True)
class Forecast:
    """A run before it is run."""

    processes: int
    micro_batch_size: int
    accumulation: int
    tokens_per_step: int
    tokens: int
    legs: tuple[Leg, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        legs = [
            {"begin": leg.begin, "end": leg.end, "parameters": leg.model.num_parameters,
             "memory": {**asdict(leg.memory), "total": leg.memory.total}, "flops_per_step": leg.flops_per_step}
            for leg in self.legs
        ]  # fmt: skip
        return {**asdict(self), "legs": legs}


def shares_of(recipe: TrainRecipe, num_processes: int) -> tuple[int, int]:
    """How many sequences a process computes at once, and how often it does for one optimizer step.

    Raises:
        TrainError: the batch does not divide so.
    """
    at_once = recipe.micro_batch_size or recipe.batch_size // num_processes
    if not at_once or recipe.batch_size % (num_processes * at_once):
        raise TrainError(
            f"batch_size {recipe.batch_size} does not divide into {num_processes} processes with "
            f"{recipe.micro_batch_size or 'one or more'} sequences at once; change batch_size or micro_batch_size"
        )
    return at_once, recipe.batch_size // (num_processes * at_once)


def headers_of(recipe: TrainRecipe, num_processes: int, *, done: int = 0) -> list[Header]:
    """The model at the start, and after each growth; those at steps below `done` are behind the run.

    Raises:
        GdagrowError: it cannot be read, cannot grow so, or has nothing of what shall be frozen.
        TrainError: several processes cannot carry out a growth.
    """
    headers = [header_of(recipe.model)]
    if isinstance(trained_of(headers[0].config), Llama):
        _require_plain(recipe, num_processes)
    if recipe.freeze is not None:
        _require_at_start(recipe, headers[0])
    for growth in recipe.growth:
        expand = with_derived_sizes(headers[-1].config, growth.expand)
        if expand.select == "norm":  # of weights that are not trained yet; sizes do not depend on the choice
            expand = expand.model_copy(update={"select": None})
        plan = make_plan(headers[-1], expand)
        _require_in_growth(growth, plan)
        if num_processes > 1 and growth.at >= done:
            _require_no_new_parameters(growth.at, plan)
        headers.append(header_of_config(plan.config))
    return headers


def _require_plain(recipe: TrainRecipe, num_processes: int) -> None:
    """Raise TrainError if a recipe asks of standard attention what is made for differential attention alone."""
    freezes_old = recipe.freeze is not None and recipe.freeze.asks_for_old
    asked = {
        "growth": recipe.growth, "multipliers": recipe.multipliers, "health_every": recipe.health_every,
        "freeze of what is old": freezes_old, "several processes": num_processes > 1,
    }  # fmt: skip
    if found := [name for name, is_asked in asked.items() if is_asked]:
        raise TrainError(
            f"model_type llama is a baseline of standard attention, trained by one process and never grown: leave out "
            f"{', '.join(found)}"
        )


def _require_at_start(recipe: TrainRecipe, header: Header) -> None:
    from gdagrow.train.freeze import blocks, old_heads, old_layers  # which need torch, as no other recipe does

    freeze, directory = recipe.freeze, recipe.model.directory
    assert freeze is not None
    if freeze.heads == "old" and directory is not None:
        old_heads(header.config, directory, header.tensors)
    if freeze.layers != "old":
        blocks(header.tensors, freeze.layers)
    elif directory is not None:
        old_layers(header.config, directory)


def _require_in_growth(growth: MidRunGrowth, plan: GrowthPlan) -> None:
    """Raise TrainError if a growth has nothing of what shall be frozen after it."""
    freeze, found = growth.freeze, None
    if freeze is None:
        return
    layers = [] if freeze.layers == "old" else [layer for layer in freeze.layers if layer >= plan.after.num_layers]
    if freeze.layers == "old" and not plan.layers.new:
        found = "it adds no blocks, so all of them are old; freeze heads instead"
    elif layers:
        told = ", ".join(map(str, layers))
        found = f"the grown model has no layer {told}, only {plan.after.num_layers} layers counted from 0"
    elif freeze.heads == "old" and plan.before.heads == plan.after.heads:
        found = "it clones no heads, so all of them are old; freeze layers instead"
    if found:
        raise TrainError(f"growth at step {growth.at}, freeze: {found}")


def _require_no_new_parameters(at: int, plan: GrowthPlan) -> None:
    """Raise TrainError if a growth has parameters that an optimizer of several processes has no name for."""
    found = "the head of untied embeddings" if plan.tied_before and not plan.tied_after else None
    found = "new blocks" if plan.layers.new else found
    if found:
        raise TrainError(
            f"growth at step {at}: {found} would be new to an optimizer that several processes share; run it in one "
            "process, or grow the model so with gdagrow expand before the run"
        )


def forecast(recipe: TrainRecipe, num_processes: int) -> Forecast:
    """Say what a run would be on so many processes.

    Raises:
        GdagrowError: the model cannot be read, cannot grow so, or the batch does not divide.
    """
    at_once, accumulation = shares_of(recipe, num_processes)
    begins = [0, *(growth.at for growth in recipe.growth)]
    legs = tuple(
        _leg(recipe, header, begin, end, num_processes, at_once)
        for header, begin, end in zip(
            headers_of(recipe, num_processes), begins, [*begins[1:], recipe.steps], strict=True
        )
    )
    per_step = recipe.batch_size * recipe.context_length
    return Forecast(num_processes, at_once, accumulation, per_step, per_step * recipe.steps, legs)


def _leg(recipe: TrainRecipe, header: Header, begin: int, end: int, num_processes: int, at_once: int) -> Leg:
    figures = checkpoint_figures(header)
    look_back = recipe.context_length / 2 / figures.context_length
    per_token = figures.matmul_flops_per_token + figures.attention_flops_per_token * look_back
    flops = round(_PASSES * per_token * recipe.batch_size * recipe.context_length)
    return Leg(begin, end, figures, _memory(recipe, header, figures, num_processes, at_once), flops)


def _memory(recipe: TrainRecipe, header: Header, figures: ModelFigures, num_processes: int, at_once: int) -> Memory:
    share = -(-figures.num_parameters // num_processes)
    moments = _moments(recipe, figures)
    item, tokens = _COMPUTED_BYTES[recipe.precision], at_once * recipe.context_length
    layer = activation_bytes(header.config, figures.sizes) * tokens
    stored = figures.sizes.hidden * item * tokens
    layers = figures.sizes.num_layers
    return Memory(
        weights=share * _KEPT_BYTES,
        gradients=share * _KEPT_BYTES,
        optimizer=-(-moments // num_processes) * _KEPT_BYTES,
        gathered=_gathered(header, item) if num_processes > 1 else figures.num_parameters * item * (item < _KEPT_BYTES),
        activations=layers * stored + layer if recipe.gradient_checkpointing else layers * layer,
        # In the dtype of the computation, as float32 for the loss, and the gradients of both.
        logits=tokens * figures.sizes.vocab * 2 * (item + _KEPT_BYTES),
    )


def _moments(recipe: TrainRecipe, figures: ModelFigures) -> int:
    """Values that the optimizer keeps."""
    optimizer, parameters = recipe.optimizer, figures.num_parameters
    if optimizer.name == "sgd":
        return parameters if optimizer.momentum else 0
    # Muon keeps one for the matrices of the layers (and of what little else there is in them).
    in_layers = figures.parameters["attention"] + figures.parameters["mlp"]
    return 2 * parameters - (in_layers if optimizer.name == "muon" else 0)


def _gathered(header: Header, item: int) -> int:
    """Two units whole in the dtype of the computation, one at work and one on its way, and one's gradients."""
    units: dict[str, int] = {}
    for name, info in header.tensors.items():
        unit = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        units[unit] = units.get(unit, 0) + info.num_elements
    return max(units.values()) * (2 * item + _KEPT_BYTES)


def activation_bytes(config: Mapping[str, Any], sizes: Sizes) -> int:
    """About how many bytes one layer keeps of a token for its backward pass.

    Counted on small models: 4 bytes a value even in bf16, since norms and the difference of the two attentions are
    computed in float32 and both are kept.
    """
    heads, width = sizes.heads, sizes.head_dim
    projected = (heads.num_query_heads + 2 * heads.value_heads * heads.num_kv_groups) * width
    read = heads.value_heads * width * heads.num_query_heads
    gated = {"poly_norm": 8, "silu": 4}[config["hidden_act"]] * sizes.ffn
    return _KEPT_BYTES * (6 * sizes.hidden + projected + 4 * read + gated)
