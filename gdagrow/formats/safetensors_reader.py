"""Read rows of stored tensors straight from the mapped file, without holding the file in memory."""

import mmap
import os
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from gdagrow.errors import CheckpointError
from gdagrow.formats.safetensors_header import read_shard
from gdagrow.header import ITEM_BYTES, Header, TensorInfo

TORCH_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorReader:
    """The floating-point tensors of a checkpoint, mapped row range by row range.

    Each tensor that is returned owns a mapping of just its own bytes: its pages leave this process when the tensor is
    dropped, and files larger than RAM need no address space reserved for them. While it lives it holds one file
    descriptor, also after the reader is closed. Writing to it never changes the file.
    """

    def __init__(self, header: Header) -> None:
        """Open every shard.

        Raises:
            CheckpointError: a shard is gone, or its header is no longer the one that was read.
        """
        assert header.view_of is None, "a view is read by gdagrow.reading.open_reader"
        self._header = header
        self._files: dict[str, int] = {}
        self._stats: dict[str, tuple[int, int, int]] = {}
        try:
            for shard in header.shards:
                self._open(shard)
            self._require_same_headers()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def tensor(self, name: str) -> torch.Tensor:
        """Return all of one tensor, as `rows` does."""
        info = self._header.tensors[name]
        return self._view(info, info.start, info.shape)

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows `[begin, end)` along the leading dimension; all of a tensor that has no dimension.

        Returns:
            A view of the file's pages, to be read only, in the stored dtype and of shape `[end - begin, ...]`; a copy
            where the file does not align the rows to their item size.

        Raises:
            CheckpointError: the dtype is not a floating-point one that is read, or the shard changed on disk.
        """
        info = self._header.tensors[name]
        if not info.shape:
            return self.tensor(name)
        assert 0 <= begin <= end <= info.shape[0], f"rows [{begin}, {end}) of {name} {info.shape}"
        row_bytes = prod(info.shape[1:]) * ITEM_BYTES[info.dtype]
        return self._view(info, info.start + begin * row_bytes, (end - begin, *info.shape[1:]))

    def _view(self, info: TensorInfo, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        path = self._header.directory / info.shard
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {info.name!r}: expected a dtype of {', '.join(TORCH_DTYPES)}, got {info.dtype}; "
                "convert or remove it"
            )
        file = self._files[info.shard]
        if _stat(file) != self._stats[info.shard]:
            raise _changed(path)
        num_elements = prod(shape)
        if not num_elements:
            return torch.empty(shape, dtype=dtype)
        num_bytes = num_elements * dtype.itemsize
        # A private writable mapping, since torch warns of buffers that it could not write to.
        skipped = start % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(file, skipped + num_bytes, access=mmap.ACCESS_COPY, offset=start - skipped)
        except OSError as error:
            raise CheckpointError(f"{path}: tensor {info.name!r} cannot be mapped ({error.strerror})") from None
        if start % dtype.itemsize:
            octets = torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=skipped)
            return octets.clone().view(dtype).view(shape)
        return torch.frombuffer(mapped, dtype=dtype, count=num_elements, offset=skipped).view(shape)

    def _open(self, shard: str) -> None:
        path = self._header.directory / shard
        try:
            self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
        self._stats[shard] = _stat(self._files[shard])

    def _require_same_headers(self) -> None:
        found: dict[str, TensorInfo] = {}
        for shard in self._files:
            found |= read_shard(self._header.directory / shard)[0]
        changed = {info.shard for info in self._header.tensors.values() if found.get(info.name) != info}
        if changed:
            raise _changed(self._header.directory / min(changed))


def _stat(file: int) -> tuple[int, int, int]:
    stat = os.fstat(file)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was being read: its header, size or time is no longer what it was; "
        "let nothing write to the source, and start again"
    )
