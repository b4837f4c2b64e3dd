"""What a model's loss on a text is held against: what its bigrams, and a compressor, make of that text."""

import math
import zlib
from typing import Final

import torch
from torch import Tensor

_COUNTED: Final = 2**22  # bytes that are counted at once


def bigram_loss(training: Tensor, ids: Tensor) -> float:
    """Nats per byte on `ids` of the bigram model counted on `training`, add-one smoothed.

    Args:
        training: Bytes, uint8, one dim.
        ids: Bytes, int64 `[sequences, length]`; the first of each sequence is not predicted.
    """
    counts = torch.ones(256 * 256, dtype=torch.float64)
    for start in range(0, len(training) - 1, _COUNTED):
        part = training[start : start + _COUNTED + 1]
        counts += torch.bincount(part[:-1].long() * 256 + part[1:], minlength=256 * 256)
    counts = counts.view(256, 256)
    log_probability = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -float(log_probability[ids[:, :-1], ids[:, 1:]].mean())


def gzip_loss(text: bytes) -> float:
    """Nats per byte of a text as `gzip -9` packs it, header left out."""
    return len(zlib.compress(text, 9)) * 8 * math.log(2) / len(text)
