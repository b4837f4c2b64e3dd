"""Compare what two checkpoints compute: their logits on the same tokens, against a budget for rounding alone."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdagrow.archs import architecture_of
from gdagrow.errors import CompareError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.header import Header
from gdagrow.models.layers import at_least_float32
from gdagrow.verify.forward import StreamedModel

# By Higham and Mary (2019) a sum of n terms errs by more than `8 * sqrt(n)` roundings with probability 3e-14.
_CERTAINTY = 8.0

# Logits of both models that are in memory at a time.
_LOGIT_ELEMENTS = 2**24


@dataclass(frozen=True)
class Change:
    """A size that differs between the two models."""

    what: str
    source: str
    grown: str


@dataclass(frozen=True)
class Comparison:
    """How two models' logits differ.

    equivalent: Whether `max_rel` is within `tolerance`.
    max_abs: The largest absolute difference of a logit.
    max_rel: The same over the source's largest absolute logit.
    kl: Mean KL divergence from source to grown, nats per position.
    top1_agreement: Share of positions with the same most likely token.
    tolerance: What rounding alone may do to `max_rel` (see `rounding_budget`).
    condition: How much of a relative disturbance of every layer's arithmetic reaches the source's logits, measured.
    dtype: Dtype of the arithmetic.
    num_sequences, length: The tokens compared.
    changes: Structural changes.
    """

    equivalent: bool
    max_abs: float
    max_rel: float
    kl: float
    top1_agreement: float
    tolerance: float
    condition: float
    dtype: str
    num_sequences: int
    length: int
    changes: tuple[Change, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite (a broken model's figures) becomes None."""
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in asdict(self).items()}  # fmt: skip


def compare(
    source: Path,
    grown: Path,
    tokens: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Run two checkpoints on the same tokens, one layer of one of them in memory at a time.

    Args:
        source, grown: Checkpoint directories.
        tokens: int64 `[seqs, length]`.
        dtype: Dtype of the arithmetic; float64 shows the weights, a shorter one its own rounding.
        device: Where it is done.
        progress: Told what is being run.

    Raises:
        CheckpointError: a checkpoint cannot be read or run.
        CompareError: the models have different vocabularies, or the source's logits are not finite.
    """
    headers = read_header(source), read_header(grown)
    before, after = (StreamedModel(header, dtype=dtype, device=device) for header in headers)
    if before.sizes.vocab != after.sizes.vocab:
        raise CompareError(
            f"{source} has a vocabulary of {before.sizes.vocab} tokens and {grown} one of {after.sizes.vocab}; "
            "logits can only be compared over the same one"
        )
    report = progress or (lambda _: None)
    noise = _Disturbance(len(tokens), dtype)
    # The source runs twice in one batch, the second time with every projection and norm disturbed a little.
    pair = _run(before, tokens.repeat(2, 1), lambda part: report(f"source {part}"), noise)
    states = pair[: len(tokens)], pair[len(tokens) :], _run(after, tokens, lambda part: report(f"grown {part}"), None)
    report("logits")
    figures = _Figures()
    step = max(1, _LOGIT_ELEMENTS // before.sizes.vocab)
    blocks = [torch.split(state.flatten(0, 1), step) for state in states]
    for clean, disturbed, other in zip(
        before.logits(blocks[0]), before.logits(blocks[1]), after.logits(blocks[2]), strict=True
    ):
        figures.add(clean.double(), disturbed.double(), other.double())
    if not math.isfinite(figures.largest):
        raise CompareError(f"{source}: the model's own logits are not finite, so there is nothing to compare with")
    condition = figures.disturbed / figures.largest / noise.size
    tolerance = rounding_budget(dtype, max(after.sizes.hidden, after.sizes.ffn, before.sizes.ffn), condition)
    max_rel = figures.apart / figures.largest
    return Comparison(
        equivalent=max_rel <= tolerance, max_abs=figures.apart, max_rel=max_rel, kl=figures.kl / figures.count,
        top1_agreement=figures.agreed / figures.count, tolerance=tolerance, condition=condition,
        dtype=str(dtype).removeprefix("torch."), num_sequences=len(tokens), length=tokens.shape[1],
        changes=_changes(*headers),
    )  # fmt: skip


def rounding_budget(dtype: torch.dtype, longest_sum: int, condition: float) -> float:
    """The relative difference of logits that rounding alone may cause between two ways to compute them.

    Every projection and norm errs by one rounding of its result in `dtype`, and by `sqrt(n)` roundings of the
    accumulator for sums of `n` terms; the source's measured `condition` says how much of that reaches the logits.
    """
    stored, accumulated = torch.finfo(dtype).eps / 2, torch.finfo(at_least_float32(dtype)).eps / 2
    return _CERTAINTY * condition * (stored + sqrt(longest_sum) * accumulated)


class _Disturbance:
    """A forward hook that disturbs the second half of a batch by `size`, relative to each position's own scale."""

    def __init__(self, num_clean: int, dtype: torch.dtype) -> None:
        self._num_clean = num_clean
        self._generator = torch.Generator().manual_seed(0)
        self.size = sqrt(torch.finfo(dtype).eps)  # far above rounding, far below where the model bends

    def __call__(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        clean, disturbed = output[: self._num_clean], output[self._num_clean :]
        noise = torch.randn(disturbed.shape, generator=self._generator, dtype=torch.float32).to(output)
        scale = disturbed.square().mean(-1, keepdim=True).sqrt()
        return torch.cat((clean, disturbed + noise * scale * self.size))


class _Figures:
    """Running figures over blocks of positions."""

    def __init__(self) -> None:
        self.largest = self.apart = self.disturbed = self.kl = self.agreed = 0.0
        self.count = 0

    def add(self, clean: Tensor, disturbed: Tensor, other: Tensor) -> None:
        self.largest = _larger(self.largest, clean.abs().max())
        self.apart = _larger(self.apart, (clean - other).abs().max())
        self.disturbed = _larger(self.disturbed, (clean - disturbed).abs().max())
        log_p, log_q = clean.log_softmax(-1), other.log_softmax(-1)
        # Rounding may take a divergence of nothing below zero.
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0).sum())
        self.agreed += float((clean.argmax(-1) == other.argmax(-1)).sum())
        self.count += len(clean)


def _larger(known: float, found: Tensor) -> float:
    """The larger of two; NaN if either is, which `max` would lose."""
    return math.nan if math.isnan(known) or found.isnan() else max(known, float(found))


def _run(model: StreamedModel, tokens: Tensor, report: Callable[[str], None], hook: _Disturbance | None) -> Tensor:
    with torch.no_grad():
        states = model.hidden_states(tokens, hook)
        hidden = next(states)
        for layer in range(1, model.sizes.num_layers + 1):
            report(f"layer {layer} of {model.sizes.num_layers}")
            hidden = next(states)
        return next(states, hidden)


def _changes(source: Header, grown: Header) -> tuple[Change, ...]:
    told = [_structure(header) for header in (source, grown)]
    return tuple(Change(what, told[0][what], told[1][what]) for what in told[0] if told[0][what] != told[1][what])


def _structure(header: Header) -> dict[str, str]:
    architecture = architecture_of(header.config)
    sizes = architecture.sizes(header.config)
    heads = sizes.heads
    counts = {
        "signal heads": heads.num_signal_heads, "noise heads": heads.num_groups, "KV groups": heads.num_kv_groups,
        "head_dim": sizes.head_dim, "hidden size": sizes.hidden, "FFN size": sizes.ffn, "layers": sizes.num_layers,
        "parameters": sum(prod(info.shape) for info in header.tensors.values()),
    }  # fmt: skip
    return {
        "ratio": f"{heads.ratio}:1", **{what: f"{count:,}" for what, count in counts.items()},
        "embeddings": "tied" if architecture.is_tied(header.config) else "untied",
        "weight dtypes": ", ".join(sorted({info.dtype for info in header.tensors.values()})),
    }  # fmt: skip
