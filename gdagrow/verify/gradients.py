"""Compare the gradients of two checkpoints by the mirror rule, which says whose optimizer moments can be carried."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from gdagrow.archs import architecture_of
from gdagrow.axes import IndexMap, parse
from gdagrow.engine import grow_moment
from gdagrow.errors import CompareError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.growth import TensorGrowth
from gdagrow.header import Header
from gdagrow.plan import GrownRow, claim, grown_rows, why_moments_are_lost
from gdagrow.verify.backward import BackwardPass, Gradients
from gdagrow.verify.forward import HEAD_ELEMENTS, StreamedModel
from gdagrow.verify.lineage import Lineage, lineage_of
from gdagrow.verify.logits import longest_sum, require_same_vocabulary, rounds_weights
from gdagrow.verify.rounding import Budget, Disturbance

Progress = Callable[[str], None]

# Times that the source runs again, disturbed: a gradient that hangs on one number, such as lambda, may not move once.
_NUM_DISTURBED: Final = 2

UNEQUAL_PARTS: Final = "parts of a split differ: by zero-sum noise, or where the dtype cannot hold equal ones"


@dataclass(frozen=True)
class GradientDifference:
    """How the gradients of one grown tensor differ from its source's, relative to the largest that is expected.

    name, parameter: The tensor, and its row in the architecture's table.
    chain: From the chain rule: the gradients of all copies of what the layer writes sum to the source's, and those
        of what it reads are the source's each. It holds for every growth that preserves the function.
    mirror: From the mirror rule, by which moments are carried: the sum is in equal parts.
    tolerance: What rounding alone may do to either, by the measured condition of the source's own gradient.
    lost: Why moments cannot be carried exactly, or None where they can.
    """

    name: str
    parameter: str
    chain: float
    mirror: float
    tolerance: float
    lost: str | None

    @property
    def agrees(self) -> bool:
        """Whether the chain rule holds within rounding."""
        return self.chain <= self.tolerance


@dataclass(frozen=True)
class GradientComparison:
    """Whether a grown checkpoint's gradients are its source's, and whose optimizer moments can be carried.

    equivalent: Whether the chain rule holds for every tensor.
    loss: The source's mean cross-entropy, nats.
    dtype: Dtype of the arithmetic.
    num_sequences, length: The tokens.
    maps: Where the index maps come from: `growth.json` or `config.json`.
    tensors: Every grown tensor, in the order of the backward pass.
    """

    equivalent: bool
    loss: float
    dtype: str
    num_sequences: int
    length: int
    maps: str
    tensors: tuple[GradientDifference, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite (a broken model's gradients) becomes None."""
        content = asdict(self)
        for tensor in content["tensors"]:
            tensor |= {key: None for key in ("chain", "mirror", "tolerance") if not math.isfinite(tensor[key])}
        return content


def compare_gradients(
    source: Path,
    grown: Path,
    tokens: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    progress: Progress | None = None,
) -> GradientComparison:
    """Run one backward pass of two checkpoints side by side, half a layer of each in memory at a time.

    Args:
        source, grown: Checkpoint directories.
        tokens: int64 `[seqs, length]`, at least two tokens each.
        dtype: Dtype of the arithmetic.
        device: Where it is done.
        progress: Told what is being run.

    Raises:
        CheckpointError: a checkpoint or `growth.json` cannot be read or run.
        CompareError: no maps lead from one model to the other, their tensors are others, or the loss is not finite.
    """
    if tokens.shape[1] < 2:
        raise CompareError("a gradient needs a next token: expected sequences of at least 2 tokens, got 1")
    headers = read_header(source), read_header(grown)
    noises = [Disturbance(0, dtype, seed) for seed in range(_NUM_DISTURBED)]
    report = progress or (lambda _: None)
    with ExitStack() as stack:
        before, after, *disturbed = (
            stack.enter_context(StreamedModel(header, dtype=dtype, device=device, hook=hook))
            for header, hook in ((headers[0], None), (headers[1], None), *((headers[0], _hook(n)) for n in noises))
        )
        require_same_vocabulary(headers, before, after)
        untied = before.is_tied and not after.is_tied
        try:
            lineage = lineage_of(*headers, untied=untied)
        except CompareError as error:
            raise CompareError(f"gradients cannot be held against each other: {error}") from None
        meter = _Meter(headers, lineage, after, untied=untied)
        report("forward")
        passes = [BackwardPass(model, tokens) for model in (before, after)]
        passes += [
            BackwardPass(model, tokens, partial(_settled, noise))
            for model, noise in zip(disturbed, noises, strict=True)
        ]
        loss = passes[0].loss
        if not math.isfinite(loss):
            raise CompareError(f"{source}: the model's own loss is not finite, so there is nothing to compare with")
        for done, found in enumerate(zip(*(one.layers() for one in passes), strict=True)):
            report(f"backward, {done} of {2 * before.sizes.num_layers} halves of layers")
            meter.add(*found)
        report("backward, embedding and head")
        step = max(1, HEAD_ELEMENTS // after.sizes.hidden)
        for chunk in zip(*(one.vocabulary(step) for one in passes), strict=True):
            meter.add(*(gradients for _, gradients in chunk))
    longest = max(longest_sum(before, after, tokens.shape[1]), tokens.numel(), before.sizes.vocab)
    tensors = meter.differences(Budget(noises[0], dtype, longest, rounds_weights(headers, dtype)))
    return GradientComparison(
        equivalent=all(tensor.agrees for tensor in tensors), loss=loss, dtype=str(dtype).removeprefix("torch."),
        num_sequences=len(tokens), length=tokens.shape[1], maps=lineage.origin, tensors=tensors,
    )  # fmt: skip


def _settled(noise: Disturbance, states: Tensor) -> Tensor:
    """States disturbed, and their gradient when its turn comes."""
    states = noise.disturb(states)
    if states.requires_grad:
        states.register_hook(noise.disturb)  # type: ignore[no-untyped-call]
    return states


def _hook(noise: Disturbance) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _, __, output: _settled(noise, output)


@dataclass
class _Largest:
    """Running maxima of one grown tensor: what is expected of it by either rule, and how far it is from that."""

    source: float = 0.0
    moved: float = 0.0
    chain: float = 0.0
    expected: float = 0.0
    mirror: float = 0.0


class _Meter:
    """Holds gradients against what the growth's maps say of them."""

    def __init__(self, headers: tuple[Header, Header], lineage: Lineage, after: StreamedModel, *, untied: bool) -> None:
        source, grown = headers
        architecture = architecture_of(source.config)
        parameters = claim(source, architecture, architecture.sizes(source.config))
        rows = list(grown_rows(source, architecture, parameters, tied_after=after.is_tied))
        _require_same_tensors(grown, rows)
        self._rows: dict[str, list[GrownRow]] = {}
        for row in rows:
            self._rows.setdefault(row.source, []).append(row)
        self._growths = {text: TensorGrowth.of(parse(text), lineage.maps) for text in {row.notation for row in rows}}
        self._lost = {row.name: why_moments_are_lost(row, architecture, lineage.maps, untied=untied) for row in rows}
        self._found = {row.name: _Largest() for row in rows}

    def add(self, source: Gradients, grown: Gradients, *disturbed: Gradients) -> None:
        """Add the gradients of some tensors, or of the same rows of embedding and head."""
        for name, gradient in source.items():
            rows = self._rows[name]
            growths = [_of_rows(self._growths[row.notation], gradient) for row in rows]
            whole = _gathered(growths[0], gradient)
            # Two tensors that grew from one, such as an untied head and its embedding, share its gradient.
            summed = sum(
                (_summed(growth, grown[row.name]) for growth, row in zip(growths, rows, strict=True)), 0 * whole
            )
            for growth, row in zip(growths, rows, strict=True):
                found, expected = self._found[row.name], grow_moment(growth, gradient, 1)
                found.source = _larger(found.source, gradient)
                for moved in disturbed:
                    found.moved = _larger(found.moved, gradient - moved[name])
                found.chain = _larger(found.chain, summed - whole)
                found.expected = _larger(found.expected, expected)
                found.mirror = _larger(found.mirror, grown[row.name] - expected)

    def differences(self, budget: Budget) -> tuple[GradientDifference, ...]:
        """Everything that was added."""
        rows = list(chain.from_iterable(self._rows.values()))
        tolerances = {row.name: self._tolerance(self._found[row.name], budget) for row in rows}
        # The same row of the table in another layer is one more measurement of its condition.
        highest: dict[str, float] = {}
        for row in rows:
            highest[row.parameter.name] = max(highest.get(row.parameter.name, 0.0), tolerances[row.name])
        return tuple(self._difference(row, self._found[row.name], highest[row.parameter.name]) for row in rows)

    @staticmethod
    def _tolerance(found: _Largest, budget: Budget) -> float:
        # A gradient that is zero everywhere has no scale.
        return budget.tolerance(found.moved, found.source or 1.0)

    def _difference(self, row: GrownRow, found: _Largest, tolerance: float) -> GradientDifference:
        scale, expected = found.source or 1.0, found.expected or 1.0
        mirror, lost = found.mirror / expected, self._lost[row.name]
        if lost is None and not mirror <= tolerance:
            lost = UNEQUAL_PARTS
        return GradientDifference(row.name, row.parameter.name, found.chain / scale, mirror, tolerance, lost)


def _require_same_tensors(grown: Header, rows: list[GrownRow]) -> None:
    names = {row.name for row in rows}
    if problems := sorted(names ^ grown.tensors.keys()):
        raise CompareError(
            f"{grown.directory}: {', '.join(problems)}: in one of the two models only, so that gradients cannot be "
            "held against each other; gdagrow diff --weights lists what differs"
        )


def _of_rows(growth: TensorGrowth, gradient: Tensor) -> TensorGrowth:
    """The growth of the rows that there are: all, or some tokens' of a vocabulary, which never grows."""
    if len(gradient) == growth.dims[0].old_size:
        return growth
    return TensorGrowth((IndexMap.identity(len(gradient)), *growth.dims[1:]), growth.reads)


def _gathered(growth: TensorGrowth, source: Tensor) -> Tensor:
    """The source's gradient at every grown index."""
    for dim, old in enumerate(growth.dims):
        source = source.index_select(dim, _indices(old, source))
    return source


def _summed(growth: TensorGrowth, gradient: Tensor) -> Tensor:
    """The sum over all copies along what the layer writes, at every one of them."""
    for dim, (index_map, reads) in enumerate(zip(growth.dims, growth.reads, strict=True)):
        if not reads and not index_map.is_identity:
            old = _indices(index_map, gradient)
            shape = [*gradient.shape]
            shape[dim] = index_map.old_size
            gradient = gradient.new_zeros(shape).index_add_(dim, old, gradient).index_select(dim, old)
    return gradient


def _indices(index_map: IndexMap, like: Tensor) -> Tensor:
    return torch.tensor(list(index_map), device=like.device)


def _larger(known: float, found: Tensor) -> float:
    """The larger of two; NaN if either is, which `max` would lose."""
    largest = float(found.abs().max())
    return math.nan if math.isnan(known) or math.isnan(largest) else max(known, largest)
