"""Where two models part: each layer's attention, MLP and residual stream, grown against the mapped source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from gdagrow.archs import Sizes
from gdagrow.axes import AxisMaps
from gdagrow.models.layers import GdaAttention, GdaMlp
from gdagrow.verify.forward import Branch
from gdagrow.verify.rounding import Disturbance, rounding_budget

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
    head: The grown head with the largest difference, where the part has heads.
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
    """How the indices of a part's dimension `dim` are mapped, and the names of the grown ones if they are heads."""

    dim: int
    old: Tensor
    names: tuple[str, ...] = field(default=())


class PartMeter:
    """Measures part after part of two models that run side by side.

    Args:
        maps: The growth from the one to the other.
        after: Sizes of the grown model.
        noise: What disturbs the source's last sequences, by which the tolerances are measured.
        budget: The arguments of `rounding_budget` but for the condition.
    """

    def __init__(
        self, maps: AxisMaps, before: Sizes, after: Sizes, noise: Disturbance, dtype: torch.dtype, longest_sum: int,
        *, rounds_weights: bool, device: str,
    ) -> None:  # fmt: skip
        self._noise = noise
        self._dtype, self._longest_sum, self._rounds_weights = dtype, longest_sum, rounds_weights
        group, ratio = list(maps.of("group", None)), before.heads.ratio
        signal = [old * ratio + j for new, old in enumerate(group) for j in maps.of("signal", new)]
        signal_names = tuple(
            f"signal head {j} of group {g}" for g in range(after.heads.num_groups) for j in range(after.heads.ratio)
        )
        noise_names = tuple(f"noise head of group {g}" for g in range(after.heads.num_groups))
        self._stream = _Axis(-1, torch.tensor(list(maps.of("hidden", None)), device=device))
        signals = _Axis(1, torch.tensor(signal, device=device), signal_names)
        self._axes: Mapping[str, _Axis] = {
            "signal heads": signals, "differences": signals,
            "noise heads": _Axis(1, torch.tensor(group, device=device), noise_names),
        }  # fmt: skip
        self.found: list[PartDifference] = []

    def add(self, layer: int | None, part: str, source: Tensor, grown: Tensor) -> None:
        """Measure one part: `source` has the same sequences again, disturbed, behind those that `grown` has."""
        axis = self._axes.get(part, self._stream)
        clean, disturbed = source.chunk(2)
        apart = (grown - clean.index_select(axis.dim, axis.old)).abs()
        scale = float(clean.abs().max())
        moved = float((disturbed - clean).abs().max())
        worst = None
        if axis.names:
            by_head = apart.transpose(0, axis.dim).flatten(1).amax(1)
            worst = axis.names[int(by_head.argmax())]
        max_abs = float(apart.max())
        # A part that is zero everywhere, such as the output of a block that starts from zero, has no scale.
        max_rel, condition = (max_abs / scale, self._noise.condition_of(moved, scale)) if scale else (max_abs, 0.0)
        tolerance = rounding_budget(self._dtype, self._longest_sum, condition, rounds_weights=self._rounds_weights)
        self.found.append(PartDifference(layer, part, max_abs, max_rel, tolerance, worst))


def parts_of(branch: Branch[GdaAttention] | Branch[GdaMlp], hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
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
