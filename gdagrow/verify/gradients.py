"""Compare the gradients of two checkpoints by the mirror rule, which says whose optimizer moments can be carried."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from gdagrow.depth import Layers
from gdagrow.errors import CompareError
from gdagrow.verify.backward import BackwardPass, Gradients
from gdagrow.verify.forward import HEAD_ELEMENTS, StreamedModel
from gdagrow.verify.lineage import lineage_of
from gdagrow.verify.logits import longest_sum, require_same_vocabulary, rounds_weights
from gdagrow.verify.mirror import GradientDifference, GradientMeter
from gdagrow.verify.pair import read_pair
from gdagrow.verify.rounding import Budget, Disturbance
from gdagrow.views import View
from gdagrow.views.convert import as_motif

Progress = Callable[[str], None]

# Times that the source runs again, disturbed: a gradient that hangs on one number, such as lambda, may not move once.
_NUM_DISTURBED: Final = 2


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
    headers = read_pair(source, grown)
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
        views = as_motif(headers[0]), as_motif(headers[1])
        converted = isinstance(views[0], View) and not isinstance(views[1], View)
        meter = GradientMeter(views, lineage, untied=untied, converted=converted)
        report("forward")
        passes = [BackwardPass(model, tokens) for model in (before, after)]
        passes += [
            BackwardPass(model, tokens, partial(_settled, noise))
            for model, noise in zip(disturbed, noises, strict=True)
        ]
        loss = passes[0].loss
        if not math.isfinite(loss):
            raise CompareError(f"{source}: the model's own loss is not finite, so there is nothing to compare with")
        for done, found in enumerate(_side_by_side([one.layers() for one in passes], lineage.layers)):
            report(f"backward, {done} of {2 * after.sizes.num_layers} halves of layers")
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


def _side_by_side(passes: Sequence[Iterator[Gradients]], layers: Layers) -> Iterator[list[Gradients]]:
    """Yield the gradients of the last norm and of every half of a layer, of all passes.

    The second is the grown model's; the others have nothing where its block is new.
    """
    is_new = [False, *(layer in layers.new for layer in reversed(range(len(layers.source))) for _ in range(2))]
    for new, grown in zip(is_new, passes[1], strict=True):
        yield [grown if number == 1 else {} if new else next(one) for number, one in enumerate(passes)]
    # What comes behind the last layer is done when there is no more.
    assert not any(next(one, None) for one in passes), "the passes are of other depths"


def _settled(noise: Disturbance, states: Tensor) -> Tensor:
    """States disturbed, and their gradient when its turn comes."""
    states = noise.disturb(states)
    if states.requires_grad:
        states.register_hook(noise.disturb)  # type: ignore[no-untyped-call]
    return states


def _hook(noise: Disturbance) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _, __, output: _settled(noise, output)
