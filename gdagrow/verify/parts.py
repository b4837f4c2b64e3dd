"""Where two models part: each layer's attention, MLP and residual stream, grown against the mapped source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from gdagrow.archs import Sizes
from gdagrow.axes import AxisMaps
from gdagrow.depth import Layers
from gdagrow.growth import GrowthMaps
from gdagrow.models.layers import GdaAttention, GdaMlp
from gdagrow.verify.forward import Branch
from gdagrow.verify.rounding import Budget

AnyBranch = Branch[GdaAttention] | Branch[GdaMlp]
_Both = tuple[Tensor, Tensor]  # the source's, with its disturbed copy behind it, and the grown model's

# A result that rounding may change by more than this has left the range in which a condition says by how much.
LARGEST_TOLERANCE: Final = 0.1


@dataclass(frozen=True)
class PartDifference:
    """How far one part of the grown model is from the source's, each index held against the one it was grown from.

    layer: Its layer, or None for the embedding.
    part: `embedding`, `signal heads` and `noise heads` (what their attention reads), `differences` (what `o_proj`
        reads), `attention` and `mlp` (what they add to the stream), or `residual` (the stream after the layer).
    max_abs: The largest absolute difference.
    max_rel: The same over the largest absolute value of the source's part.
    tolerance: What rounding alone may do to `max_rel`, by the part's own measured condition.
    head: The head with the largest difference: the grown one where the part has heads, the source's where `o_proj`
        makes something else of it; None where heads have no part in it.
    """

    layer: int | None
    part: str
    max_abs: float
    max_rel: float
    tolerance: float
    head: str | None

    @property
    def agrees(self) -> bool:
        """Whether the part is the same within rounding, or rounding may do so much that nothing can be said."""
        return self.max_rel <= self.tolerance or self.tolerance > LARGEST_TOLERANCE


@dataclass(frozen=True)
class _Axis:
    """How the indices of a part's dimension `dim` are mapped, and the names of the grown ones if they are heads.

    `num_fresh`: How many indices there are of which the source has none, and which are zero; they number on from its.
    """

    dim: int
    old: Tensor
    names: tuple[str, ...] = field(default=())
    num_fresh: int = 0

    def of_source(self, part: Tensor) -> Tensor:
        """The source's part at every grown index."""
        if self.num_fresh:
            shape = [*part.shape]
            shape[self.dim] = self.num_fresh
            part = torch.cat((part, part.new_zeros(shape)), self.dim)
        return part.index_select(self.dim, self.old)


class PartMeter:
    """Measures part after part of two models that run side by side, the grown one by `maps` from the other."""

    def __init__(
        self, maps: GrowthMaps, layers: Layers, before: Sizes, after: Sizes, budget: Budget, device: str
    ) -> None:
        self.layers = layers
        self._budget, self._after, self._device = budget, after, device
        hidden = maps.common.of("hidden", None)
        self._stream = _Axis(-1, torch.tensor(list(hidden), device=device), num_fresh=hidden.num_fresh)
        by_maps = {id(of_layer): self._head_axes(of_layer, before.heads.ratio) for of_layer in maps.by_layer}
        self._head_axes_of_layer = [by_maps[id(of_layer)] for of_layer in maps.by_layer]
        self._axes = self._head_axes_of_layer[0]
        self.found: list[PartDifference] = []

    def _head_axes(self, maps: AxisMaps, ratio: int) -> Mapping[str, _Axis]:
        group, heads = list(maps.of("group", None)), self._after.heads
        signal = [old * ratio + j for new, old in enumerate(group) for j in maps.of("signal", new)]
        signal_names = tuple(
            f"signal head {j} of group {g}" for g in range(heads.num_groups) for j in range(heads.ratio)
        )
        noise_names = tuple(f"noise head of group {g}" for g in range(heads.num_groups))
        signals = _Axis(1, torch.tensor(signal, device=self._device), signal_names)
        noises = _Axis(1, torch.tensor(group, device=self._device), noise_names)
        return {"signal heads": signals, "differences": signals, "noise heads": noises}

    def step_alone(self, layer: int, grown: AnyBranch, states: Tensor, like: Tensor) -> Tensor:
        """Run half a new block, which must add nothing: returns what it adds to its stream `states`.

        `like`: The source's stream, of which there is no part to measure.
        """
        part, added = list(parts_of(grown, states))[-1]
        self.add(layer, part, torch.zeros_like(like), added)
        return added

    def step(self, layer: int, source: AnyBranch, grown: AnyBranch, states: _Both) -> _Both:
        """Run half a layer of both models and measure every part of it; returns what each adds to its stream."""
        self._axes = self._head_axes_of_layer[layer]
        read = states
        for (part, one), (_, other) in zip(parts_of(source, states[0]), parts_of(grown, states[1]), strict=True):
            self.add(layer, part, one, other)
            if part == "differences":
                read = one, other
        differs = not self.found[-1].agrees and all(found.agrees for found in self.found[:-1])
        if differs and isinstance(source.inner, GdaAttention) and isinstance(grown.inner, GdaAttention):
            self._name_head(source.inner, grown.inner, read)
        return one, other

    def add(self, layer: int | None, part: str, source: Tensor, grown: Tensor) -> None:
        """Measure one part: `source` has the same sequences again, disturbed, behind those that `grown` has."""
        axis = self._axes.get(part, self._stream)
        clean, disturbed = source.chunk(2)
        apart = (grown - axis.of_source(clean)).abs()
        scale = float(clean.abs().max())
        moved = float((disturbed - clean).abs().max())
        worst = None
        if axis.names:
            by_head = apart.transpose(0, axis.dim).flatten(1).amax(1)
            worst = axis.names[int(by_head.argmax())]
        max_abs = float(apart.max())
        # A part that is zero everywhere, such as the output of a block that starts from zero, has no scale.
        max_rel, tolerance = (max_abs / scale, self._budget.tolerance(moved, scale)) if scale else (max_abs, 0.0)
        self.found.append(PartDifference(layer, part, max_abs, max_rel, tolerance, worst))

    def _name_head(self, source: GdaAttention, grown: GdaAttention, read: _Both) -> None:
        """Find the head of which `o_proj` makes something else, and name it in the part that was added last."""
        old_heads, ratio = self._axes["differences"].old, source.config.ratio
        worst, largest = None, 0.0
        for head in range(source.config.num_signal_heads):
            copies = (old_heads == head).nonzero()[:, 0].tolist()
            made = _output_of(source, read[0].chunk(2)[0], [head])
            apart = _output_of(grown, read[1], copies) - self._stream.of_source(made)
            if (found := float(apart.abs().max())) > largest:
                worst, largest = f"signal head {head % ratio} of group {head // ratio} of the source", found
        self.found[-1] = replace(self.found[-1], head=worst)


def _output_of(attention: GdaAttention, heads: Tensor, chosen: list[int]) -> Tensor:
    """What `o_proj` makes of some heads, `[seqs, length, hidden]`, of `[seqs, heads, length, width]`."""
    width = heads.shape[-1]
    weight = attention.o_proj.weight
    return torch.stack([heads[:, i] @ weight[:, i * width : (i + 1) * width].T for i in chosen]).sum(0)


def parts_of(branch: AnyBranch, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Run half a layer and yield every part of it, `[seqs, heads, length, width]` or `[seqs, length, width]`.

    The last one is what it adds to the stream.
    """
    normed, inner = branch.norm(hidden), branch.inner
    if isinstance(inner, GdaMlp):
        yield "mlp", inner(normed)
        return
    signal, noise = inner.attend(inner.project(normed))
    yield "signal heads", signal
    yield "noise heads", noise
    difference = inner.difference(signal, noise)
    yield "differences", difference.view(*hidden.shape[:2], signal.shape[1], -1).transpose(1, 2)
    yield "attention", inner.o_proj(difference)
