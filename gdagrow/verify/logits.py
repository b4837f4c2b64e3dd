"""Compare what two checkpoints compute on the same tokens, part by part, against a budget for rounding alone."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.errors import CheckpointError, CompareError
from gdagrow.header import ITEM_BYTES, Header
from gdagrow.verify.decode import Decoding, decode
from gdagrow.verify.figures import LogitFigures
from gdagrow.verify.forward import StreamedModel
from gdagrow.verify.lineage import Lineage, lineage_of
from gdagrow.verify.pair import HeaderPair, read_pair
from gdagrow.verify.parts import PartDifference, PartMeter
from gdagrow.verify.rounding import Budget, Disturbance
from gdagrow.verify.settings import Setting, other_settings
from gdagrow.views.deeper import deepened

_PROMPT_LENGTH = 32

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Change:
    """A size that differs between the two models."""

    what: str
    source: str
    grown: str


@dataclass(frozen=True)
class Comparison:
    """How two models differ in what they compute.

    equivalent: Whether the logits are within `tolerance`, and greedy decoding writes the same tokens.
    max_abs: The largest absolute difference of a logit.
    max_rel: The same over the source's largest absolute logit.
    kl: Mean KL divergence from source to grown, nats per position.
    top1_agreement: Share of positions where the grown model's most likely token is one of the source's.
    source_loss, grown_loss: Mean cross-entropy of the next tokens, nats; None for sequences of one token.
    tolerance: What rounding alone may do to `max_rel` (see `rounding_budget`).
    condition: How much of a relative disturbance of every layer's arithmetic reaches the source's logits, measured.
    longest_sum, rounds_weights: What else the tolerance was made from.
    dtype: Dtype of the arithmetic.
    num_sequences, length: The tokens compared.
    parts: Every part of every layer, in the order of the arithmetic; empty if there is no way to map them.
    parts_not_compared: Why there is none, or None.
    decoding: What both models wrote, if that was asked for.
    changes: Structural changes.
    settings: Keys of the configs that growth never changes, that differ and may change the function.
    """

    equivalent: bool
    max_abs: float
    max_rel: float
    kl: float
    top1_agreement: float
    source_loss: float | None
    grown_loss: float | None
    tolerance: float
    condition: float
    longest_sum: int
    rounds_weights: bool
    dtype: str
    num_sequences: int
    length: int
    parts: tuple[PartDifference, ...]
    parts_not_compared: str | None
    decoding: Decoding | None
    changes: tuple[Change, ...]
    settings: tuple[Setting, ...]

    @property
    def first_difference(self) -> PartDifference | None:
        """The first part, in the order of the arithmetic, that rounding does not explain."""
        return next((part for part in self.parts if not part.agrees), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite (a broken model's figures) becomes None."""
        first = self.first_difference
        content = {**asdict(self), "first_difference": asdict(first) if first else None}
        return {key: _finite(value) for key, value in content.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def compare(
    source: Path,
    grown: Path,
    tokens: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    num_decoded: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Run two checkpoints side by side on the same tokens, half a layer of each in memory at a time.

    Args:
        source, grown: Checkpoint directories.
        tokens: int64 `[seqs, length]`.
        dtype: Dtype of the arithmetic; float64 shows the weights, a shorter one its own rounding.
        device: Where it is done.
        num_decoded: Tokens that both models write, greedily and through their caches, after the first tokens.
        progress: Told what is being run.

    Raises:
        CheckpointError: a checkpoint cannot be read or run.
        CompareError: the models have different vocabularies, or the source's logits are not finite or all zero.
    """
    headers = read_pair(source, grown)
    report = progress or (lambda _: None)
    noise = Disturbance(len(tokens), dtype)
    with (
        torch.no_grad(),
        StreamedModel(headers[0], dtype=dtype, device=device, hook=noise) as before,
        StreamedModel(headers[1], dtype=dtype, device=device) as after,
    ):
        require_same_vocabulary(headers, before, after)
        longest = longest_sum(before, after, tokens.shape[1])
        budget = Budget(noise, dtype, longest, rounds_weights(headers, dtype))
        meter, reason, config = None, None, headers[0].config
        try:
            lineage = lineage_of(*headers)
            config = _config_as_grown(lineage, *headers)
            meter = PartMeter(lineage.maps, lineage.layers, before.sizes, after.sizes, budget, device)
        except (CheckpointError, CompareError) as error:
            reason = str(error)
        run = _Run(before, after, noise, meter, report)
        figures = run.figures(tokens)
        if not 0 < figures.largest < math.inf:
            raise CompareError(
                f"{source}: the model's own logits are not finite, or all zero, so there is nothing to compare with"
            )
        tolerance = budget.tolerance(figures.disturbed, figures.largest)
        decoding = None
        if num_decoded:
            prompt = tokens[:1, :_PROMPT_LENGTH]
            decoding = decode(before, after, prompt, num_decoded, tolerance=tolerance, progress=report)
    max_rel, targets = figures.apart / figures.largest, figures.num_targets
    return Comparison(
        equivalent=max_rel <= tolerance and (decoding is None or decoding.same),
        max_abs=figures.apart, max_rel=max_rel, kl=figures.kl / figures.num_positions,
        top1_agreement=figures.agreed / figures.num_positions,
        source_loss=figures.source_loss / targets if targets else None,
        grown_loss=figures.grown_loss / targets if targets else None,
        tolerance=tolerance, condition=noise.condition_of(figures.disturbed, figures.largest),
        longest_sum=longest, rounds_weights=budget.rounds_weights,
        dtype=str(dtype).removeprefix("torch."), num_sequences=len(tokens), length=tokens.shape[1],
        parts=tuple(meter.found) if meter else (), parts_not_compared=reason, decoding=decoding,
        changes=_changes(*(header.stored for header in headers)),
        settings=other_settings(config, headers[1].config),
    )  # fmt: skip


def _config_as_grown(lineage: Lineage, source: Header, grown: Header) -> Mapping[str, Any]:
    """The source's config with what growth changes beside sizes: the eps of norms that average over more."""
    try:
        return lineage.seen(source).config
    except CompareError:  # of several growths, whose weights cannot be folded back at once
        architecture = architecture_of(source.config)
    config = deepened(source, architecture, lineage.layers).config if lineage.layers.new else source.config
    hidden, key = lineage.maps.common.of("hidden", None), architecture.norm_eps
    if not hidden.num_fresh or key is None:
        return config
    eps, found = config[key] * (hidden.size - hidden.num_fresh) / hidden.size, grown.config.get(key)
    # Each growth rounds its own share of it.
    is_it = isinstance(found, float) and math.isclose(eps, found, rel_tol=1e-12)
    return {**config, key: found if is_it else eps}


class _Run:
    """Both models on the same tokens, side by side; behind the source's go the same again, disturbed."""

    def __init__(
        self, before: StreamedModel, after: StreamedModel, noise: Disturbance, meter: PartMeter | None, report: Progress
    ) -> None:
        self._before, self._after, self._noise, self._meter, self._report = before, after, noise, meter, report

    def figures(self, tokens: Tensor) -> LogitFigures:
        states = self._before.embed(tokens.repeat(2, 1)), self._after.embed(tokens)
        self._measure(None, "embedding", *states)
        for layer, source, grown in self._layers():
            for is_mlp in (False, True):
                states = self._half(layer, is_mlp, source, grown, states)
            self._measure(layer, "residual", *states)
        clean, other = self._before.last_norm()(states[0]), self._after.last_norm()(states[1])
        self._report("logits")
        figures = LogitFigures()
        targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -1)), 1).to(clean.device)
        flat = clean[: len(tokens)].flatten(0, 1), other.flatten(0, 1), clean[len(tokens) :].flatten(0, 1)
        figures.add(self._before, self._after, flat, targets.flatten())
        return figures

    def _layers(self) -> Iterator[tuple[int, int | None, int | None]]:
        """Yield the number of each layer, and which layer of the source and of the grown model it is, if one at all."""
        before, after = self._before.sizes.num_layers, self._after.sizes.num_layers
        num_layers = max(before, after)
        for layer in range(num_layers):
            self._report(f"layer {layer + 1} of {num_layers}")
            if self._meter:
                layers = self._meter.layers
                yield layer, None if layer in layers.new else layers.source[layer], layer
            else:
                yield layer, layer if layer < before else None, layer if layer < after else None

    def _half(
        self, layer: int, is_mlp: bool, source_layer: int | None, grown_layer: int | None,
        states: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Half a layer of each model, where it has one."""
        source = None if source_layer is None else self._before.half(source_layer, is_mlp=is_mlp)
        grown = None if grown_layer is None else self._after.half(grown_layer, is_mlp=is_mlp)
        clean, other = states
        if self._meter and source and grown:
            added = self._meter.step(layer, source, grown, states)
            return self._noise.disturb(clean + added[0]), other + added[1]
        if self._meter and grown:
            return clean, other + self._meter.step_alone(layer, grown, other, clean)
        return self._noise.disturb(source(clean)) if source else clean, grown(other) if grown else other

    def _measure(self, layer: int | None, part: str, source: Tensor, grown: Tensor) -> None:
        if self._meter:
            self._meter.add(layer, part, source, grown)


def require_same_vocabulary(headers: HeaderPair, before: StreamedModel, after: StreamedModel) -> None:
    if before.sizes.vocab != after.sizes.vocab:
        source, grown = (header.directory for header in headers)
        raise CompareError(
            f"{source} has a vocabulary of {before.sizes.vocab} tokens and {grown} one of {after.sizes.vocab}: neither "
            "logits nor weights can be compared, growth never changes the vocabulary; gdagrow inspect and gdagrow "
            "stats show each model by itself"
        )


def longest_sum(before: StreamedModel, after: StreamedModel, length: int) -> int:
    """Terms of the longest sum: over features, over what `o_proj` and `down_proj` read, or over positions."""
    widths = ((m.hidden, m.ffn, m.heads.num_signal_heads * 2 * m.head_dim) for m in (before.sizes, after.sizes))
    return max(length, *(width for model in widths for width in model))


def rounds_weights(headers: HeaderPair, dtype: torch.dtype) -> bool:
    """Whether weights are stored with more bits than the arithmetic has."""
    return any(ITEM_BYTES[info.dtype] > dtype.itemsize for header in headers for info in header.tensors.values())


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
        "layout": architecture.name,
        "ratio": f"{heads.ratio}:1", **{what: f"{count:,}" for what, count in counts.items()},
        "embeddings": "tied" if architecture.is_tied(header.config) else "untied",
        "weight dtypes": ", ".join(sorted({info.dtype for info in header.tensors.values()})),
    }  # fmt: skip
