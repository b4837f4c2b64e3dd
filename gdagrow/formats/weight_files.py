"""The weight files of a checkpoint, held open and watched for changes: where rows of tensors lie in them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from typing_extensions import Self

from gdagrow.errors import CheckpointError
from gdagrow.formats.safetensors_header import read_shard
from gdagrow.formats.watched import FileStat, file_stat
from gdagrow.header import ITEM_BYTES, Header, TensorInfo

FLOATING: Final = ("F64", "F32", "F16", "BF16")
NO_FILE: Final = -1


@dataclass(frozen=True)
class RowsInFile:
    """Rows of a tensor: `num_bytes` from byte `start` of its shard, which is open as `file`.

    Rows that a view puts together are in `NO_FILE`, and start where they would if the tensor were one.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    file: int
    start: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.info.dtype]


class RowFiles(Protocol):
    """What finds rows and reads their bytes: see `WeightFiles`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def find(self, name: str, begin: int = 0, end: int | None = None) -> RowsInFile: ...

    def read(self, rows: RowsInFile, skipped: int, octets: memoryview) -> None: ...


class WeightFiles:
    """The floating-point tensors of a checkpoint in its open files."""

    def __init__(self, header: Header) -> None:
        """Open every shard.

        Raises:
            CheckpointError: a shard is gone, or its header is no longer the one that was read.
        """
        self._header = header
        self._files: dict[str, int] = {}
        self._stats: dict[str, FileStat] = {}
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

    def find(self, name: str, begin: int = 0, end: int | None = None) -> RowsInFile:
        """Find rows `[begin, end)` along the leading dimension; all of a tensor that has no dimension.

        Raises:
            CheckpointError: the dtype is not a floating-point one that is read, or the shard changed on disk.
        """
        info = self._header.tensors[name]
        if info.dtype not in FLOATING:
            path = self._header.directory / info.shard
            raise CheckpointError(
                f"{path}: tensor {info.name!r}: expected a dtype of {', '.join(FLOATING)}, got {info.dtype}; "
                "convert or remove it"
            )
        file = self._files[info.shard]
        if file_stat(os.fstat(file)) != self._stats[info.shard]:
            raise self._changed(info.shard)
        if not info.shape:
            return RowsInFile(info, (), file, info.start)
        end = info.shape[0] if end is None else end
        assert 0 <= begin <= end <= info.shape[0], f"rows [{begin}, {end}) of {name} {info.shape}"
        row_bytes = prod(info.shape[1:]) * ITEM_BYTES[info.dtype]
        return RowsInFile(info, (end - begin, *info.shape[1:]), file, info.start + begin * row_bytes)

    def read(self, rows: RowsInFile, skipped: int, octets: memoryview) -> None:
        """Fill `octets` with the bytes of rows that were found, after the first `skipped`.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        done = 0
        while done < len(octets):
            try:
                count = os.preadv(rows.file, [octets[done:]], rows.start + skipped + done)
            except OSError as error:
                raise self.unreadable(rows.info, "read", error) from None
            if not count:
                raise self._changed(rows.info.shard)
            done += count

    def _open(self, shard: str) -> None:
        path = self._header.directory / shard
        try:
            self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
        self._stats[shard] = file_stat(os.fstat(self._files[shard]))

    def _require_same_headers(self) -> None:
        found: dict[str, TensorInfo] = {}
        for shard in self._files:
            found |= self._stored(self._header.directory / shard)
        changed = {info.shard for info in self._header.tensors.values() if found.get(info.name) != info}
        if changed:
            raise self._changed(min(changed))

    def _stored(self, path: Path) -> Mapping[str, TensorInfo]:
        """What a weight file says that it holds."""
        return read_shard(path)[0]

    def unreadable(self, info: TensorInfo, what: str, error: OSError) -> CheckpointError:
        path = self._header.directory / info.shard
        return CheckpointError(f"{path}: tensor {info.name!r} cannot be {what} ({error.strerror})")

    def _changed(self, shard: str) -> CheckpointError:
        return CheckpointError(
            f"{self._header.directory / shard} changed while it was being read: its header, size or time is no longer "
            "what it was; let nothing write to the source, and start again"
        )
