"""The reader that a header asks for: of the stored tensors, or of those that a view makes of them."""

from bisect import bisect_right
from itertools import accumulate
from math import prod
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from gdagrow.axes import IndexMap
from gdagrow.dcp import DcpHeader
from gdagrow.dcp_tensors import DcpTensors
from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.formats.torch_file import TorchFileHeader, TorchFileReader
from gdagrow.formats.weight_files import NO_FILE, RowFiles, RowsInFile, WeightFiles
from gdagrow.header import ITEM_BYTES, Header, TensorInfo
from gdagrow.views import Made, Seen, View, Zeros, origin_of


class RowReader(Protocol):
    """What reads stored tensors, and rows of them, by name: see `TensorReader`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None: ...

    def tensor(self, name: str) -> Tensor: ...

    def rows(self, name: str, begin: int, end: int) -> Tensor: ...


def open_reader(header: Header) -> RowReader:
    """Open the files of a checkpoint.

    Raises:
        CheckpointError: a shard is gone, or its header is no longer the one that was read.
    """
    if isinstance(header, DcpHeader):
        return DcpTensors(header)
    if isinstance(header, TorchFileHeader):
        return TorchFileReader(header)
    return ViewReader(header) if isinstance(header, View) else TensorReader(header)


class ViewReader:
    """The tensors of a view (see `gdagrow.views`), row range by row range.

    Rows that lie in another order are copied together, a run of them at a time; made tensors are computed, in float64.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._under = open_reader(view.under)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._under.close()

    def tensor(self, name: str) -> Tensor:
        """Return all of one tensor."""
        how = self._view.derived[name]
        if isinstance(how, Made):
            return torch.tensor(how.make(*self._values(how.names)), dtype=torch.float64)
        if isinstance(how, Seen) and how.rows is None:
            return self._under.tensor(how.name)
        return self.rows(name, 0, self._view.tensors[name].shape[0])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Return rows `[begin, end)` of a tensor."""
        how = self._view.derived[name]
        if isinstance(how, Made):
            return self.tensor(name)[begin:end]
        if isinstance(how, Zeros):
            info = self._view.tensors[name]
            return torch.zeros((end - begin, *info.shape[1:]), dtype=DTYPES[info.dtype])
        if how.rows is None:
            return self._under.rows(how.name, begin, end)
        parts = [self._under.rows(how.name, *run) for run in _runs_between(how.rows, begin, end)]
        return torch.cat(parts) if parts else self._under.rows(how.name, 0, 0)

    def _values(self, names: tuple[str, ...]) -> list[list[float]]:
        return [self._under.tensor(name).double().tolist() for name in names]


class ReadRows:
    """A checkpoint for those who read bytes, as `WeightFiles` has them; rows are put together when they are read."""

    def __init__(self, header: Header) -> None:
        self._header, self._reader = header, open_reader(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def find(self, name: str, begin: int = 0, end: int | None = None) -> RowsInFile:
        """Rows `[begin, end)` of a tensor, in no file of their own."""
        info = self._header.tensors[name]
        shape = (info.shape[0] if end is None else end) - begin, *info.shape[1:]
        return RowsInFile(info, shape, NO_FILE, begin * _row_bytes(info))

    def read(self, rows: RowsInFile, skipped: int, octets: memoryview) -> None:
        """Fill `octets` with whole rows of those that were found, after the first `skipped` bytes."""
        row_bytes = _row_bytes(rows.info)
        begin = (rows.start + skipped) // row_bytes
        octets[:] = tensor_bytes(
            self._reader.rows(rows.info.name, begin, begin + len(octets) // row_bytes).contiguous()
        )


class ViewRows:
    """A view for those who read bytes: from the files where a tensor is stored as it is seen, else as `ReadRows`."""

    def __init__(self, view: View) -> None:
        self._made = ReadRows(view)
        self._files = WeightFiles(view.stored)
        self._stored = {
            name: origin.name
            for name in view.tensors
            if (origin := origin_of(view, name)).name is not None and origin.is_stored and origin.rows is None
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._made.__exit__(kind, error, trace)
        self._files.__exit__(kind, error, trace)

    def find(self, name: str, begin: int = 0, end: int | None = None) -> RowsInFile:
        """Rows `[begin, end)` of a tensor."""
        stored = self._stored.get(name)
        return self._made.find(name, begin, end) if stored is None else self._files.find(stored, begin, end)

    def read(self, rows: RowsInFile, skipped: int, octets: memoryview) -> None:
        """Fill `octets` with bytes of those rows, after the first `skipped`."""
        (self._made if rows.file == NO_FILE else self._files).read(rows, skipped, octets)


def open_rows(header: Header) -> RowFiles:
    """Open the files of a checkpoint for those who read bytes.

    Raises:
        CheckpointError: a shard is gone, or its header is no longer the one that was read.
    """
    if isinstance(header.stored, DcpHeader):
        return ReadRows(header)
    return ViewRows(header) if isinstance(header, View) else WeightFiles(header)


def _row_bytes(info: TensorInfo) -> int:
    return prod(info.shape[1:]) * ITEM_BYTES[info.dtype]


def _runs_between(index_map: IndexMap, begin: int, end: int) -> list[tuple[int, int]]:
    """The runs of old indices, in order, that the new indices `[begin, end)` come from."""
    starts = list(accumulate((stop - start for start, stop in index_map.runs), initial=0))
    found = []
    for at in range(bisect_right(starts, begin) - 1, len(index_map.runs)):
        if starts[at] >= end:
            break
        old = index_map.runs[at][0] - starts[at]
        found.append((old + max(begin, starts[at]), old + min(end, starts[at + 1])))
    return found
