"""From a recipe, an architecture and a source's header to an immutable plan. Every refusal is here, before any work."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from gdagrow.archs import Architecture, Sizes, architecture_of
from gdagrow.asked import (
    changed_keys,
    changes_config,
    deviation_asked,
    features_asked,
    layers_asked,
    require_ffn,
    rope_theta,
)
from gdagrow.axes import IndexMap
from gdagrow.depth import Layers
from gdagrow.errors import PlanError
from gdagrow.growth import GrowthMaps, TensorGrowth
from gdagrow.header import Header, TensorInfo
from gdagrow.heads import HeadGrowth, Ratio, axis_maps
from gdagrow.recipe import WIDTH_AXES, Recipe
from gdagrow.rows import claim, grown_rows, why_moments_are_lost
from gdagrow.selection import grown_heads_by_layer
from gdagrow.views import origin_of
from gdagrow.views.convert import as_motif
from gdagrow.views.deeper import copies_are_free, deepened
from gdagrow.views.wider import with_gains


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
    is_zero: Whether it is all zeros, and nothing is read for it.
    noisy: Whether its split weights get zero-sum noise.
    parted: Whether copies of its rows get noise, because the weights that read them are zero and can have none.
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
    is_zero: bool
    noisy: bool
    parted: bool
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
    def changed_keys(self) -> dict[str, tuple[Any, Any]]:
        """Keys of the config that are no sizes and that the recipe changes, with both values; `absent` for none."""
        before = {"rope_theta": rope_theta(self.header.config)}
        after = {"rope_theta": rope_theta(self.config)}
        for config, found in ((self.header.config, before), (self.config, after)):
            found["max_position_embeddings"] = config.get("max_position_embeddings")
        changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        return {key: ("absent" if old is None else old, new) for key, (old, new) in changed.items()}

    @property
    def converted_from(self) -> str | None:
        """The source's architecture, if the growth is one of a view in another layout."""
        name = architecture_of(self.header.stored.config).name
        return None if name == self.architecture.name else name


def make_plan(header: Header, recipe: Recipe) -> GrowthPlan:
    """Plan a growth.

    Args:
        header: The source checkpoint's config and tensors; weights are read to select heads by norm alone.
        recipe: What the user asks for.

    Raises:
        CheckpointError: the config makes no sense, no table covers it, or tensors are missing, unknown or misshapen.
        PlanError: this checkpoint cannot be grown so.
        RecipeError: the file that says which signal heads are cloned cannot be read.
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
    layers = layers_asked(before, recipe)
    hidden, ffn = features_asked(before.hidden, recipe, "hidden"), features_asked(before.ffn, recipe, "ffn")
    require_ffn(architecture, header.config, ffn)
    after = Sizes(heads[0].after, before.head_dim, hidden.size, ffn.size, before.vocab, len(layers.source))
    if after == before and tied_after == tied and recipe.to is None and not changes_config(header.config, recipe):
        told = f"the ratio {recipe.signal}" if isinstance(recipe.signal, Ratio) else "these sizes"
        raise PlanError(f"nothing would grow: the source already has {told}")
    if layers.new:
        header = deepened(header, architecture, layers)
    header = with_gains(header, architecture, before.hidden, hidden.size)
    plain = {"hidden": hidden, "ffn": ffn, "vocab": IndexMap.identity(before.vocab)}
    heads_of_layer = tuple(heads[source] for source in layers.source)
    known = {id(growth): axis_maps(growth, before.head_dim, plain) for growth in heads}
    maps = GrowthMaps(tuple(known[id(growth)] for growth in heads_of_layer))
    tensors = tuple(_tensor_plans(header, recipe, architecture, layers, maps, tied_after))
    config = architecture.grown_config(header.config, after, tied=tied_after) | changed_keys(header.config, recipe)
    return GrowthPlan(
        header, recipe, architecture, before, after, layers, heads_of_layer, maps, config, tied, tied_after,
        deviation_asked(header.config), tensors,
    )  # fmt: skip


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


def _tensor_plans(
    header: Header, recipe: Recipe, architecture: Architecture, layers: Layers, maps: GrowthMaps, tied_after: bool
) -> Iterator[TensorPlan]:
    untied = architecture.is_tied(header.config) and not tied_after
    for row in grown_rows(header, architecture, len(maps.by_layer), tied_after=tied_after):
        growth, origin = row.growth(maps), origin_of(header, row.source)
        carries_split = row.notation != row.parameter.notation
        read = (dim for dim, reads in zip(growth.dims, growth.reads, strict=True) if reads)
        yield TensorPlan(
            name=row.name, source=header.tensors[row.source], parameter=row.parameter.name, notation=row.notation,
            part=row.parameter.part, growth=growth, stored=origin.name,
            is_zero=origin.is_zero,
            noisy=growth.splits and not (recipe.exact_copies or carries_split or origin.is_zero),
            parted=copies_are_free(row.parameter, row.layer, layers) and not recipe.exact_copies,
            learning_rate_multiplier=prod((dim.old_size / (dim.size - dim.num_fresh) for dim in read), start=1.0),
            moments_lost=why_moments_are_lost(row, header, architecture, maps, untied=untied),
        )  # fmt: skip
