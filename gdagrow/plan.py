"""From a recipe, an architecture and a source's header to an immutable plan. Every refusal is here, before any work."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from gdagrow.archs import Architecture, Parameter, Sizes, architecture_of
from gdagrow.axes import AxisMaps, IndexMap, parse
from gdagrow.convert import as_motif
from gdagrow.errors import PlanError
from gdagrow.growth import TensorGrowth
from gdagrow.header import Header, TensorInfo
from gdagrow.heads import HeadGrowth, Ratio, axis_maps, grow_heads
from gdagrow.recipe import Recipe
from gdagrow.rows import claim, grown_rows, why_moments_are_lost

# The paper's ratios decline beyond this many signal heads to a noise head.
LARGEST_SUPPORTED_RATIO = 5


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the grown checkpoint.

    name: Its name in the grown checkpoint.
    source: The stored tensor that it grows from.
    parameter: Its row in the architecture's table, with `{layer}` standing for every layer.
    notation: Its dimensions in arrow notation.
    part: `embedding`, `attention`, `mlp`, `norm` or `head`.
    growth: Its index maps.
    noisy: Whether its split weights get zero-sum noise.
    learning_rate_multiplier: Suggested: a split weight is `1/copies` of what it was while an optimizer's step is not.
    moments_lost: Why its optimizer moments cannot be carried exactly, or None where they can.
    """

    name: str
    source: TensorInfo
    parameter: str
    notation: str
    part: str
    growth: TensorGrowth
    noisy: bool
    learning_rate_multiplier: float
    moments_lost: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.growth.shape

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ((self.source.stop - self.source.start) // self.source.num_elements)


@dataclass(frozen=True)
class GrowthPlan:
    """Everything that a growth will do: every map, shape and byte, and the grown config.

    header: What is grown: the source, or a view of it in the layout that the recipe asks for.
    """

    header: Header
    recipe: Recipe
    architecture: Architecture
    before: Sizes
    after: Sizes
    heads: HeadGrowth
    maps: AxisMaps
    config: Mapping[str, Any]
    tied_before: bool
    tied_after: bool
    tensors: tuple[TensorPlan, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of weights to write."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def factors(self) -> dict[str, int | str]:
        """What was done to each width axis; a target ratio as text."""
        asked = {axis: self.recipe.factor(axis) for axis in ("signal", "noise", "kv", "hidden", "ffn")}
        return {axis: str(value) if isinstance(value, Ratio) else value for axis, value in asked.items()}

    @property
    def converted_from(self) -> str | None:
        """The source's architecture, if the growth is one of a view in another layout."""
        stored = self.header.stored
        return None if stored is self.header else architecture_of(stored.config).name

    @property
    def hints(self) -> tuple[str, ...]:
        """What a user may want to know before going on; never a refusal."""
        hints = []
        if self.converted_from:
            hints.append("the conversion makes each layer's subln.weight, lambda_q1 and lambda_k1, in float64 because "
                         "a shorter dtype would round them; a trainer that casts them changes the function by that "
                         "rounding")  # fmt: skip
        ratio = self.after.heads.ratio
        if ratio > LARGEST_SUPPORTED_RATIO:
            hints.append(f"the ratio {ratio}:1 is above {LARGEST_SUPPORTED_RATIO}:1, where the paper saw quality "
                         f"decline (3:1 to 4:1 train best){self._back_in_range()}")  # fmt: skip
        if self.recipe.exact_copies:
            hints.append("exact copies see identical gradients and stay identical for ever in training")
        lost: dict[str, dict[str, None]] = {}
        for tensor in self.tensors:
            if tensor.moments_lost:
                lost.setdefault(tensor.moments_lost, {})[tensor.parameter.removeprefix("model.layers.{layer}.")] = None
        if lost:
            told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in lost.items())
            hints.append(f"optimizer moments cannot be carried exactly for {told}")
        return tuple(hints)

    def _back_in_range(self) -> str:
        before, after = self.before.heads, self.after.heads
        noise = after.num_groups // before.num_groups
        signal, uneven = divmod(after.num_signal_heads, before.num_signal_heads)
        for more in range(2, after.ratio + 1):
            if after.ratio % more == 0 and after.ratio // more <= LARGEST_SUPPORTED_RATIO:
                if isinstance(self.recipe.signal, int) and self.recipe.uniform == 1:
                    return f"; noise x{noise * more} as well would make it {after.ratio // more}:1"
                # Neither a target ratio nor a uniform factor gives way to a noise factor beside it.
                factors = f"signal x{signal}, noise x{noise * more}"
                return "" if uneven else f"; the factors {factors} would make it {after.ratio // more}:1"
        return ""


def make_plan(header: Header, recipe: Recipe) -> GrowthPlan:
    """Plan a growth.

    Args:
        header: The source checkpoint's config and tensors; no weight is read.
        recipe: What the user asks for.

    Raises:
        CheckpointError: the config makes no sense, no table covers it, or tensors are missing, unknown or misshapen.
        PlanError: this checkpoint cannot be grown so.
    """
    architecture = architecture_of(header.config)
    before = architecture.sizes(header.config)
    parameters = claim(header, architecture, before)
    if recipe.to is not None:
        header = _converted(header, architecture)
        architecture = architecture_of(header.config)
        parameters = claim(header, architecture, before)
    heads = grow_heads(
        before.heads, signal=recipe.factor("signal"), noise=_whole(recipe, "noise"), kv=_whole(recipe, "kv")
    )
    _require_ratio(architecture, heads)
    hidden = IndexMap.tile(before.hidden, _whole(recipe, "hidden"))
    ffn = IndexMap.tile(before.ffn, _whole(recipe, "ffn"))
    maps = axis_maps(heads, before.head_dim, {"hidden": hidden, "ffn": ffn, "vocab": IndexMap.identity(before.vocab)})
    after = Sizes(heads.after, before.head_dim, hidden.size, ffn.size, before.vocab, before.num_layers)
    tied = architecture.is_tied(header.config)
    if recipe.embeddings and not tied:
        raise PlanError(f"embeddings {recipe.embeddings}: the source's head and embedding are not tied; leave it out")
    tied_after = tied and recipe.embeddings != "untie"
    if after == before and tied_after == tied and recipe.to is None:
        raise PlanError(f"nothing would grow: the source already has the ratio {before.heads.ratio}:1")
    tensors = tuple(_tensor_plans(header, recipe, architecture, parameters, maps, tied_after))
    config = architecture.grown_config(header.config, after, tied=tied_after)
    return GrowthPlan(header, recipe, architecture, before, after, heads, maps, config, tied, tied_after, tensors)


def _converted(header: Header, architecture: Architecture) -> Header:
    view = as_motif(header)
    if view is header:
        raise PlanError(f"to motif: {header.directory} has the {architecture.name} layout already; leave it out")
    return view


def _require_ratio(architecture: Architecture, heads: HeadGrowth) -> None:
    only, ratio = architecture.only_ratio, heads.after.ratio
    if only is not None and ratio != only:
        raise PlanError(
            f"the ratio would become {ratio}:1, and the {architecture.name} layout has {only}:1 alone; grow signal and "
            "noise by the same factor, or convert the checkpoint as well with --to motif (to: motif in a recipe)"
        )


def _whole(recipe: Recipe, axis: str) -> int:
    factor = recipe.factor(axis)
    assert isinstance(factor, int)
    return factor


def _tensor_plans(
    header: Header, recipe: Recipe, architecture: Architecture, parameters: dict[str, Parameter], maps: AxisMaps,
    tied_after: bool,
) -> Iterator[TensorPlan]:  # fmt: skip
    untied = architecture.is_tied(header.config) and not tied_after
    for row in grown_rows(header, architecture, parameters, tied_after=tied_after):
        growth = TensorGrowth.of(parse(row.notation), maps)
        carries_split = row.notation != row.parameter.notation
        read = (dim for dim, reads in zip(growth.dims, growth.reads, strict=True) if reads)
        yield TensorPlan(
            name=row.name, source=header.tensors[row.source], parameter=row.parameter.name, notation=row.notation,
            part=row.parameter.part, growth=growth,
            noisy=growth.splits and not recipe.exact_copies and not carries_split,
            learning_rate_multiplier=prod((dim.old_size / dim.size for dim in read), start=1.0),
            moments_lost=why_moments_are_lost(
                row, architecture, maps, untied=untied, made=header.is_made(row.source)
            ),
        )  # fmt: skip
