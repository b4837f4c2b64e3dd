"""From a recipe, an architecture and a source's header to an immutable plan. Every refusal is here, before any work."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from gdagrow.archs import Architecture, Sizes, architecture_of
from gdagrow.axes import IndexMap
from gdagrow.convert import as_motif
from gdagrow.deeper import NEW_BLOCK, deepened
from gdagrow.depth import EVEN, Layers, place_blocks
from gdagrow.errors import PlanError
from gdagrow.growth import GrowthMaps, TensorGrowth
from gdagrow.header import Header, TensorInfo
from gdagrow.heads import MAX_COPIES, HeadGrowth, Ratio, axis_maps
from gdagrow.recipe import WIDTH_AXES, Recipe
from gdagrow.rows import claim, grown_rows, why_moments_are_lost
from gdagrow.selection import grown_heads_by_layer
from gdagrow.views import origin_of
from gdagrow.wider import with_gains

# Of weights that are free, where the model's config has no `initializer_range`.
DEFAULT_DEVIATION = 0.02

# The paper's ratios decline beyond this many signal heads to a noise head.
LARGEST_SUPPORTED_RATIO = 5


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the grown checkpoint.

    name: Its name in the grown checkpoint.
    source: What it grows from: a stored tensor, or one of a view.
    stored: The stored tensor that this is, or in whose place it stands; None if there is none.
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
    stored: str | None
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

    header: What is grown: the source, or a view of it in the layout and with the layers that the recipe asks for.
    layers: Which of the source's layers each grown one is, or is a copy of.
    heads_of_layer: How the heads of each grown layer come about; they may differ in what signal heads are cloned.
    deviation: The standard deviation of weights that are free.
    """

    header: Header
    recipe: Recipe
    architecture: Architecture
    before: Sizes
    after: Sizes
    layers: Layers
    heads_of_layer: tuple[HeadGrowth, ...]
    maps: GrowthMaps
    config: Mapping[str, Any]
    tied_before: bool
    tied_after: bool
    deviation: float
    tensors: tuple[TensorPlan, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of weights to write."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def heads(self) -> HeadGrowth:
        """How the heads of the first layer come about."""
        return self.heads_of_layer[0]

    @property
    def factors(self) -> dict[str, int | str]:
        """What was done to each width axis, and to the depth if anything: a target ratio, or a size, as text."""
        asked: dict[str, int | str] = {}
        for axis in WIDTH_AXES:
            value = self.recipe.factor(axis)
            asked[axis] = str(value) if isinstance(value, Ratio) else value
        sizes = {"hidden": self.recipe.hidden_to, "ffn": self.recipe.ffn_to}
        if self.layers.new:
            sizes["layers"] = self.after.num_layers
        return asked | {axis: str(size) for axis, size in sizes.items() if size is not None}

    @property
    def converted_from(self) -> str | None:
        """The source's architecture, if the growth is one of a view in another layout."""
        name = architecture_of(self.header.stored.config).name
        return None if name == self.architecture.name else name

    @property
    def hints(self) -> tuple[str, ...]:
        """What a user may want to know before going on; never a refusal."""
        hints = [*self._of_float64, *self._of_function]
        ratio = self.after.heads.ratio
        if ratio > LARGEST_SUPPORTED_RATIO:
            hints.append(f"the ratio {ratio}:1 is above {LARGEST_SUPPORTED_RATIO}:1, where the paper saw quality "
                         f"decline (3:1 to 4:1 train best){self._back_in_range()}")  # fmt: skip
        if self.recipe.exact_copies:
            hints.append("exact copies see identical gradients and stay identical for ever in training")
        lost: dict[str, dict[str, None]] = {}
        for tensor in self.tensors:
            if tensor.moments_lost and tensor.moments_lost != NEW_BLOCK:
                lost.setdefault(tensor.moments_lost, {})[tensor.parameter.removeprefix("model.layers.{layer}.")] = None
        if lost:
            told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in lost.items())
            hints.append(f"optimizer moments cannot be carried exactly for {told}")
        return tuple(hints)

    @property
    def _of_float64(self) -> Iterator[str]:
        """What is stored in float64 though its source is not."""
        made: dict[str, None] = {}
        for tensor in self.tensors:
            stored = self.header.stored.tensors.get(tensor.stored or "")
            if tensor.source.dtype == "F64" and (stored is None or stored.dtype != "F64"):
                made[tensor.parameter.removeprefix("model.layers.{layer}.")] = None
        if made:
            yield (
                f"stored in float64, because a shorter dtype would round them: {', '.join(made)}"
                f"{' of layers that move' if self.layers.moved and not self.converted_from else ''}; a trainer that "
                "casts them changes the function by that rounding"
            )

    @property
    def _of_function(self) -> Iterator[str]:
        """What changes the function, because the recipe says so."""
        before, after = rope_theta(self.header.config), rope_theta(self.config)
        if before != after:
            yield (
                f"rope_theta {before} to {after} changes the function, as the recipe asks: the grown "
                "model is another one until it is trained"
            )

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
    claim(header, architecture, before)
    tied = architecture.is_tied(header.config)
    if recipe.embeddings and not tied:
        raise PlanError(f"embeddings {recipe.embeddings}: the source's head and embedding are not tied; leave it out")
    tied_after = tied and recipe.embeddings != "untie"
    if recipe.to is not None:
        header = _converted(header, architecture)
        architecture = architecture_of(header.config)
    heads = grown_heads_by_layer(header, architecture, before, recipe)
    _require_ratio(architecture, heads[0])
    layers = _layers(before, recipe)
    hidden, ffn = _features(before.hidden, recipe, "hidden"), _features(before.ffn, recipe, "ffn")
    if ffn.num_fresh and architecture.averages_ffn(header.config):
        raise PlanError(_no_size_of_an_averaged_ffn(before.ffn, ffn.size))
    after = Sizes(heads[0].after, before.head_dim, hidden.size, ffn.size, before.vocab, len(layers.source))
    if after == before and tied_after == tied and recipe.to is None and not _changes_config(header.config, recipe):
        raise PlanError(f"nothing would grow: the source already has the ratio {before.heads.ratio}:1")
    if layers.new:
        header = deepened(header, architecture, layers)
    header = with_gains(header, architecture, before.hidden, hidden.size)
    plain = {"hidden": hidden, "ffn": ffn, "vocab": IndexMap.identity(before.vocab)}
    heads_of_layer = tuple(heads[source] for source in layers.source)
    known = {id(growth): axis_maps(growth, before.head_dim, plain) for growth in heads}
    maps = GrowthMaps(tuple(known[id(growth)] for growth in heads_of_layer))
    tensors = tuple(_tensor_plans(header, recipe, architecture, maps, tied_after))
    config = architecture.grown_config(header.config, after, tied=tied_after) | _changed_keys(header.config, recipe)
    return GrowthPlan(
        header, recipe, architecture, before, after, layers, heads_of_layer, maps, config, tied, tied_after,
        _deviation(header.config), tensors,
    )  # fmt: skip


def _layers(before: Sizes, recipe: Recipe) -> Layers:
    """Which layers there shall be."""
    if recipe.layers is not None and recipe.layers < before.num_layers:
        raise PlanError(
            f"layers {recipe.layers}: the source has {before.num_layers}, and growth never drops a layer; choose "
            f"{before.num_layers} or more"
        )
    more = recipe.depth or 0 if recipe.layers is None else recipe.layers - before.num_layers
    placement = recipe.insert or EVEN
    if recipe.layers is None and recipe.depth is None and placement.where == "after":
        more = len(placement.layers)
    return place_blocks(before.num_layers, more, placement) if more else Layers.unchanged(before.num_layers)


def _features(size: int, recipe: Recipe, axis: str) -> IndexMap:
    """The map of the residual stream, or of the FFN."""
    target: int | None = getattr(recipe, f"{axis}_to")
    if target is None:
        return IndexMap.tile(size, _whole(recipe, axis))
    if target < size:
        raise PlanError(
            f"{axis} to {target}: the source has {size}, and growth never drops a feature; choose {size} or more"
        )
    if target // size > MAX_COPIES:
        raise PlanError(f"{axis} to {target}: more than {MAX_COPIES} copies of {size}; choose a smaller size")
    return IndexMap.extended(size, target)


def _no_size_of_an_averaged_ffn(size: int, target: int) -> str:
    nearest = " or ".join(str(size * copies) for copies in (target // size, target // size + 1))
    return (
        f"ffn {size} to {target}: PolyNorm averages over all FFN units, with an eps that no config holds, so that "
        f"units beside whole copies would change all others; choose {nearest}"
    )


def _changes_config(config: Mapping[str, Any], recipe: Recipe) -> bool:
    return any(config.get(key) != value for key, value in _changed_keys(config, recipe).items())


def _changed_keys(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Keys of the config that are no sizes, as the recipe names them."""
    keys: dict[str, Any] = {}
    if recipe.max_position_embeddings is not None:
        keys["max_position_embeddings"] = recipe.max_position_embeddings
    if recipe.rope_theta is not None:
        newer = config.get("rope_parameters")  # where transformers 5 has it
        if isinstance(newer, Mapping):
            keys["rope_parameters"] = {**newer, "rope_theta": recipe.rope_theta}
        if "rope_theta" in config or "rope_parameters" not in keys:
            keys["rope_theta"] = recipe.rope_theta
    return keys


def rope_theta(config: Mapping[str, Any]) -> Any:
    """The base of RoPE as a config has it, None if it has none."""
    newer = config.get("rope_parameters")
    return config.get("rope_theta", newer.get("rope_theta") if isinstance(newer, Mapping) else None)


def _deviation(config: Mapping[str, Any]) -> float:
    """How widely free weights are drawn: as the model's own config says that weights are."""
    found = config.get("initializer_range")
    return found if isinstance(found, float) and 0 < found < 1 else DEFAULT_DEVIATION


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
    header: Header, recipe: Recipe, architecture: Architecture, maps: GrowthMaps, tied_after: bool
) -> Iterator[TensorPlan]:
    untied = architecture.is_tied(header.config) and not tied_after
    for row in grown_rows(header, architecture, len(maps.by_layer), tied_after=tied_after):
        growth, origin = row.growth(maps), origin_of(header, row.source)
        carries_split = row.notation != row.parameter.notation
        read = (dim for dim, reads in zip(growth.dims, growth.reads, strict=True) if reads)
        yield TensorPlan(
            name=row.name, source=header.tensors[row.source], parameter=row.parameter.name, notation=row.notation,
            part=row.parameter.part, growth=growth, stored=origin.name,
            noisy=growth.splits and not recipe.exact_copies and not carries_split,
            learning_rate_multiplier=prod((dim.old_size / (dim.size - dim.num_fresh) for dim in read), start=1.0),
            moments_lost=why_moments_are_lost(row, header, architecture, maps, untied=untied),
        )  # fmt: skip
