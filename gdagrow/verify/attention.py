"""Statistics of a model's attention maps: how spread signal maps, noise maps and their differences are."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    raise NotImplementedError
