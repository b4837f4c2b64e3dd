"""Statistics of a model's attention maps: how spread signal maps, noise maps and their differences are."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gdagrow.checkpoint import read_checkpoint
from gdagrow.errors import CompareError
from gdagrow.models.kernels import at_least_float32
from gdagrow.models.layers import GdaAttention, Projected
from gdagrow.verify.forward import StreamedModel

# Weights in a block of maps: the queries of one group and sequence that are measured at a time, or a single query of
# each of its signal heads where that is more.
BLOCK_WEIGHTS: Final = 2**18
# On fewer positions "the top 5%" is one position, which says nothing.
FEWEST_VISIBLE: Final = 20

Progress = Callable[[str], None]


@dataclass(frozen=True)
class MapStats:
    """One kind of map of one layer; one entry a head (signal maps and differences group-major, noise one a group).

    All are means over sequences and query positions (see `attention_stats`).

    entropy: Of `|A| / sum |A|`, in nats.
    top_1_percent, top_5_percent: Share of `sum |A|` on that share of the visible positions with the most of it,
        rounded up to whole positions.
    negative: Share of the visible positions with a negative weight; None for the maps, which have none.
    """

    entropy: tuple[float, ...]
    top_1_percent: tuple[float, ...]
    top_5_percent: tuple[float, ...]
    negative: tuple[float, ...] | None


@dataclass(frozen=True)
class LayerStats:
    """One layer: its lambda, the constant part of that, and its maps; `difference` is `signal - lambda * noise`."""

    layer: int
    lambda_: float
    lambda_init: float
    signal: MapStats
    noise: MapStats
    difference: MapStats


@dataclass(frozen=True)
class AttentionStats:
    """The attention of every layer of a model on some tokens, computed in `dtype`."""

    num_sequences: int
    length: int
    dtype: str
    num_groups: int
    ratio: int
    layers: tuple[LayerStats, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        content["layers"] = [
            {("lambda" if key == "lambda_" else key): value for key, value in layer.items()}
            for layer in content["layers"]
        ]
        return content


def attention_stats(
    checkpoint: Path,
    tokens: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> AttentionStats:
    """Run a model and measure its attention maps, half a layer and a bounded block of maps in memory at a time.

    Queries that see fewer than `FEWEST_VISIBLE` positions are left out, unless no sequence is longer than that. A
    difference that is zero everywhere counts as spread evenly.

    Args:
        checkpoint: Its directory.
        tokens: int64 `[seqs, length]`.
        dtype: Dtype of the arithmetic; maps are made in at least float32, as the model makes them.
        device: Where it is done.
        progress: Told what is being run.

    Raises:
        CheckpointError: the checkpoint cannot be read or run.
        CompareError: a layer's maps are not finite.
    """
    report = progress or (lambda _: None)
    layers: list[LayerStats] = []
    with torch.no_grad(), StreamedModel(read_checkpoint(checkpoint), dtype=dtype, device=device) as model:
        hidden = model.embed(tokens)
        for layer in range(model.sizes.num_layers):
            report(f"attention of layer {layer + 1} of {model.sizes.num_layers}")
            branch = model.attention(layer)
            inner = branch.inner
            projected = inner.project(branch.norm(hidden))
            found = _layer_stats(layer, model.lambda_init(layer), inner, projected)
            if found is None:
                raise CompareError(
                    f"{checkpoint}: the attention of layer {layer} is not finite, so there is nothing to measure; "
                    "look for weights that are not finite in it and in the layers before"
                )
            layers.append(found)
            hidden = hidden + inner.o_proj(inner.difference(*inner.attend(projected)))
            hidden = model.mlp(layer)(hidden)
        heads = model.sizes.heads
    return AttentionStats(
        num_sequences=len(tokens), length=tokens.shape[1], dtype=str(dtype).removeprefix("torch."),
        num_groups=heads.num_groups, ratio=heads.ratio, layers=tuple(layers),
    )  # fmt: skip


def measured_queries(length: int) -> range:
    """The query positions that count in sequences of `length` positions; query `i` sees `i + 1` of them."""
    return range(FEWEST_VISIBLE - 1 if length > FEWEST_VISIBLE else 0, length)


def query_blocks(length: int, ratio: int) -> Iterator[range]:
    """The measured queries, so many at a time that the maps of `ratio` heads have at most `BLOCK_WEIGHTS` weights."""
    queries, step = measured_queries(length), max(1, BLOCK_WEIGHTS // (ratio * length))
    for begin in range(queries.start, queries.stop, step):
        yield range(begin, min(begin + step, queries.stop))


def causal_map_stats(maps: Tensor) -> MapStats | None:
    """Measure maps that another model made, `[heads, length, length]` with zeros above the diagonal, as this does.

    Returns:
        One entry a head, means over query positions; None if the maps are not finite.
    """
    blocks = query_blocks(maps.shape[-1], len(maps))
    total = sum(_figures(maps[:, block.start : block.stop, : block.stop], block) for block in blocks)
    means = torch.as_tensor(total / len(measured_queries(maps.shape[-1])))
    return _map_stats(means, signed=True) if bool(means.isfinite().all()) else None


def _layer_stats(layer: int, init: float, inner: GdaAttention, projected: Projected) -> LayerStats | None:
    """Measure one layer; None if its maps are not finite."""
    config, (num_sequences, length) = inner.config, projected.signal.shape[:2]
    ratio, served = config.ratio, config.num_groups // config.num_kv_groups
    dtype = at_least_float32(projected.signal.dtype)
    lambda_ = inner.current_lambda(dtype)
    signal, difference = (torch.zeros(4, config.num_groups, ratio, dtype=torch.float64) for _ in range(2))
    noise = torch.zeros(4, config.num_groups, 1, dtype=torch.float64)
    for sequence in range(num_sequences):
        # `[heads, positions, head_dim]` each.
        queries, noise_queries, keys, noise_keys = (
            part[sequence].transpose(0, 1).to(dtype)
            for part in (projected.signal, projected.noise, projected.signal_keys, projected.noise_keys)
        )
        for group in range(config.num_groups):
            kv, heads = group // served, slice(group * ratio, (group + 1) * ratio)
            for block in query_blocks(length, ratio):
                signal_map = _causal_maps(queries[heads], keys[kv], block)
                noise_map = _causal_maps(noise_queries[group : group + 1], noise_keys[kv], block)
                signal[:, group] += _figures(signal_map, block)
                noise[:, group] += _figures(noise_map, block)
                difference[:, group] += _figures(signal_map.sub_(lambda_ * noise_map), block)
    num_queries = num_sequences * len(measured_queries(length))
    means = [(total / num_queries).flatten(1) for total in (signal, noise, difference)]
    if not all(bool(mean.isfinite().all()) for mean in means):
        return None
    return LayerStats(layer, float(lambda_), init, _map_stats(means[0]), _map_stats(means[1]),
                      _map_stats(means[2], signed=True))  # fmt: skip


def _causal_maps(queries: Tensor, keys: Tensor, block: range) -> Tensor:
    """Attention weights `[heads, len(block), block.stop]` of a block of `queries` `[heads, positions, width]`."""
    scores = queries[:, block.start : block.stop] @ keys[: block.stop].T * queries.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(block.start + 1)
    maps: Tensor = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return maps


def _figures(maps: Tensor, block: range) -> Tensor:
    """What `MapStats` has, in its order, summed over the queries of a block: float64 `[4, heads]` of maps as above."""
    visible = torch.arange(block.start + 1, block.stop + 1, device=maps.device)
    mass = maps.abs()
    total = mass.sum(-1, keepdim=True)
    share = mass / total
    if not bool(total.all()):
        even = torch.ones_like(share[0]).tril(block.start) / visible[:, None]
        share = torch.where(total == 0, even, share)
    largest = share.topk(_rounded_up(block.stop, 5), -1).values.cumsum(-1)
    tops = (largest.gather(-1, (_rounded_up(visible, percent) - 1).expand(len(maps), -1)[..., None])[..., 0]
            for percent in (1, 5))  # fmt: skip
    negative = (maps < 0).sum(-1, dtype=maps.dtype) / visible
    return torch.stack([torch.special.entr(share).sum(-1), *tops, negative]).cpu().double().sum(-1)


def _rounded_up(visible: Any, percent: int) -> Any:
    """That share of a number of positions, or of each in an int64 tensor, rounded up in whole numbers."""
    return -(-visible * percent // 100)


def _map_stats(means: Tensor, *, signed: bool = False) -> MapStats:
    entropy, top_1_percent, top_5_percent, negative = (tuple(row) for row in means.tolist())
    return MapStats(entropy, top_1_percent, top_5_percent, negative if signed else None)
