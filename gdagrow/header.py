"""What a checkpoint says of itself before any weight is read: its config and where each tensor lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

# Bytes per element of the safetensors dtype codes.
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its safetensors dtype code, its shape, and its bytes `[start, stop)` in file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checkpoint without its weights: `config.json`, every tensor by name, and the shards' own metadata."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def stored(self) -> "Header":
        """The header as it is stored, of which this one may be a view (see `gdagrow.views`)."""
        return self

    @property
    def shards(self) -> tuple[str, ...]:
        """The weight files, sorted by name."""
        return tuple(sorted({info.shard for info in self.tensors.values()}))

    @property
    def shard_bytes(self) -> Mapping[str, int]:
        """Bytes of each weight file, by name."""
        ends = {shard: 0 for shard in self.shards}
        for info in self.tensors.values():
            ends[info.shard] = max(ends[info.shard], info.stop)
        return ends

    @property
    def num_bytes(self) -> int:
        return sum(info.stop - info.start for info in self.tensors.values())
