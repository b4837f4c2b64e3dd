"""Lay out and write safetensors shards: the header first, then the tensors as they come."""

import ctypes
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from mmap import MAP_PRIVATE, mmap
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from gdagrow.errors import OutputError
from gdagrow.formats.direct_file import DirectFile
from gdagrow.formats.safetensors_header import MAX_HEADER_BYTES, SINGLE_FILE
from gdagrow.header import ITEM_BYTES

if TYPE_CHECKING:
    import torch

# A shard is hashed and written in blocks of this size, while the next ones are filled.
BLOCK_BYTES: Final = 8 * 2**20
NUM_BLOCKS: Final = 3


@dataclass(frozen=True)
class TargetTensor:
    """A tensor to be written: its safetensors dtype code and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardEntry:
    """A tensor's bytes `[start, stop)` in the data section, which begins where the shard's header ends."""

    tensor: TargetTensor
    start: int
    stop: int


@dataclass(frozen=True)
class ShardLayout:
    """One file to be written: `header` is all that stands before the first tensor, the length included."""

    file: str
    entries: tuple[ShardEntry, ...]
    header: bytes

    @property
    def data_bytes(self) -> int:
        return self.entries[-1].stop if self.entries else 0

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.data_bytes


def plan_shards(
    tensors: Sequence[TargetTensor], max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> tuple[ShardLayout, ...]:
    """Fill shards with `tensors` in the order given, at most `max_shard_bytes` of tensors in each.

    A tensor larger than that has a shard of its own. Inside a shard the larger item sizes come first, so that every
    tensor is aligned to its item size. `metadata` is written to every shard, beside `format: pt`.

    Raises:
        OutputError: a shard would hold more tensors than a safetensors header can name.
    """
    groups: list[list[TargetTensor]] = [[]]
    group_bytes = 0
    for tensor in tensors:
        if groups[-1] and group_bytes + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.num_bytes
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    texts = {"format": "pt", **(metadata or {})}
    return tuple(_layout(name, group, texts) for name, group in zip(names, groups, strict=True))


def _layout(file: str, tensors: Sequence[TargetTensor], metadata: Mapping[str, str]) -> ShardLayout:
    entries = tuple(_entries(sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])))
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for entry in entries:
        tensor = entry.tensor
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{file} would need a header of {len(text)} bytes for {len(tensors)} tensors, expected at most "
            f"{MAX_HEADER_BYTES}; ask for smaller shards"
        )
    return ShardLayout(file, entries, len(text).to_bytes(8, "little") + text)


def _entries(tensors: Sequence[TargetTensor]) -> Iterator[ShardEntry]:
    start = 0
    for tensor in tensors:
        stop = start + tensor.num_bytes
        yield ShardEntry(tensor, start, stop)
        start = stop


def index_json(layouts: Sequence[ShardLayout]) -> bytes:
    """Return the content of `model.safetensors.index.json` for these shards."""
    weight_map = {entry.tensor.name: layout.file for layout in layouts for entry in layout.entries}
    total_size = sum(layout.data_bytes for layout in layouts)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without copying them; the tensor lives as long as they do."""
    assert tensor.is_contiguous(), f"{tensor.shape} with strides {tensor.stride()}"
    assert tensor.device.type == "cpu", tensor.device
    if not tensor.nbytes:
        return memoryview(b"")
    octets = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    octets._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(octets).cast("B")


class ShardWriter:
    """Write one shard front to back, hashing it and putting it on the disk meanwhile.

    Use as a context manager: left without `close`, it closes the file as it is. It holds `NUM_BLOCKS` blocks of memory.
    """

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        """Create `path`, which may not exist, and write the header.

        Raises:
            OutputError: the file cannot be created.
        """
        self._path = path
        self._file_bytes = layout.file_bytes
        self._written = 0
        self._digest = sha256()
        # Maps begin at a page, as direct writes demand.
        self._blocks = [memoryview(mmap(-1, BLOCK_BYTES, MAP_PRIVATE)) for _ in range(NUM_BLOCKS)]
        self._in_use: deque[tuple[Future[None], ...]] = deque()
        try:
            self._file = DirectFile(path)
        except OSError as error:
            raise self._failed(error) from None
        self._hasher = ThreadPoolExecutor(1, "gdagrow-hash")
        self._disk = ThreadPoolExecutor(1, "gdagrow-disk")
        self._open = True
        self.write(memoryview(layout.header))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, buffer: memoryview) -> None:
        """Append bytes; they are copied, so the buffer is free for other use on return.

        Raises:
            OutputError: the disk refused bytes given before, or these are more than the layout's.
        """
        assert self._open, "write after close"
        rest = buffer.cast("B")
        if self._written + len(rest) > self._file_bytes:
            raise OutputError(f"{self._path}: expected {self._file_bytes} bytes, got more; report this as a bug")
        while rest:
            filled = self._written % BLOCK_BYTES
            count = min(len(rest), BLOCK_BYTES - filled)
            self._blocks[0][filled : filled + count] = rest[:count]
            self._written += count
            rest = rest[count:]
            if self._written % BLOCK_BYTES == 0:
                self._send(BLOCK_BYTES)

    def _send(self, num_bytes: int) -> None:
        """Hand the first block to the hash and the disk, and bring a free one to the front."""
        block = self._blocks[0][:num_bytes]
        self._in_use.append(
            (self._hasher.submit(self._digest.update, block), self._disk.submit(self._file.write, block))
        )
        self._blocks.append(self._blocks.pop(0))
        while len(self._in_use) >= NUM_BLOCKS:
            self._await_oldest()

    def _await_oldest(self) -> None:
        try:
            for future in self._in_use.popleft():
                future.result()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> str:
        """Finish the file on the disk.

        Returns:
            The SHA-256 of the whole file, in hexadecimal.

        Raises:
            OutputError: the disk refuses, or bytes of the layout were never written.
        """
        assert self._open, "close after close"
        if self._written != self._file_bytes:
            raise OutputError(
                f"{self._path}: expected {self._file_bytes} bytes, got {self._written}; report this as a bug"
            )
        self._send(self._written % BLOCK_BYTES)
        while self._in_use:
            self._await_oldest()
        try:
            self._file.sync()
        except OSError as error:
            raise self._failed(error) from None
        self.abort()
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Close the file as it is, if it is open, and stop the threads."""
        if not self._open:
            return
        self._open = False
        self._hasher.shutdown(cancel_futures=True)
        self._disk.shutdown(cancel_futures=True)
        self._file.close()

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path} cannot be written ({error.strerror}); free or choose another place")
