"""The bytes of rows of any checkpoint, stored or seen in a view, without torch where its files are safetensors."""

from collections.abc import Sequence
from math import prod
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from gdagrow.dcp import DcpHeader
from gdagrow.formats.weight_files import NO_FILE, RowFiles, RowsInFile, WeightFiles
from gdagrow.header import ITEM_BYTES, Header, TensorInfo
from gdagrow.views import Made, View, Zeros


def open_rows(header: Header) -> RowFiles:
    """Open the files of a checkpoint.

    Raises:
        CheckpointError: a shard is gone, or its header is no longer the one that was read.
    """
    if isinstance(header, View):
        return ViewRows(header, open_rows(header.under))
    return DcpRows(header) if isinstance(header, DcpHeader) else WeightFiles(header)


class ViewRows:
    """The rows of a view (see `gdagrow.views`), from those of what is under it."""

    def __init__(self, view: View, under: RowFiles) -> None:
        self._view, self._under = view, under

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under.__exit__(kind, error, trace)

    def find(self, name: str, begin: int = 0, end: int | None = None) -> RowsInFile:
        """Rows `[begin, end)` of a tensor, in no file of their own unless they are seen as they lie under the view."""
        how = self._view.derived[name]
        if not isinstance(how, Zeros | Made) and how.rows is None:
            return self._under.find(how.name, begin, end)
        return _in_no_file(self._view.tensors[name], begin, end)

    def read(self, rows: RowsInFile, skipped: int, octets: memoryview) -> None:
        """Fill `octets` with whole rows of those that were found, after the first `skipped` bytes."""
        info = rows.info
        if info is not self._view.tensors.get(info.name):
            self._under.read(rows, skipped, octets)
            return
        how, start = self._view.derived[info.name], rows.start + skipped
        if isinstance(how, Zeros):
            octets[:] = bytes(len(octets))
        elif isinstance(how, Made):
            made = np.array(how.make(*map(self._values, how.names)), np.float64).tobytes()
            octets[:] = made[start : start + len(octets)]
        elif how.rows is not None:
            row_bytes, done = _row_bytes(info), 0
            for run in how.rows.runs_between(start // row_bytes, (start + len(octets)) // row_bytes):
                found = self._under.find(how.name, *run)
                self._under.read(found, 0, octets[done : done + found.num_bytes])
                done += found.num_bytes

    def _values(self, name: str) -> Sequence[float]:
        found = self._under.find(name)
        octets = bytearray(found.num_bytes)
        self._under.read(found, 0, memoryview(octets))
        values: Any
        if found.info.dtype == "BF16":  # the upper half of a float32
            values = (np.frombuffer(octets, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(octets, f"f{ITEM_BYTES[found.info.dtype]}")
        floats: list[float] = values.astype(np.float64).tolist()
        return floats


class DcpRows:
    """The rows of a distributed checkpoint, put together from its chunks when they are read."""

    def __init__(self, header: DcpHeader) -> None:
        from gdagrow.dcp_tensors import DcpTensors  # imports torch

        self._header, self._reader = header, DcpTensors(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def find(self, name: str, begin: int = 0, end: int | None = None) -> RowsInFile:
        """Rows `[begin, end)` of a tensor, in no file of their own."""
        return _in_no_file(self._header.tensors[name], begin, end)

    def read(self, rows: RowsInFile, skipped: int, octets: memoryview) -> None:
        """Fill `octets` with whole rows of those that were found, after the first `skipped` bytes."""
        from gdagrow.formats.file_writer import tensor_bytes

        row_bytes = _row_bytes(rows.info)
        begin = (rows.start + skipped) // row_bytes
        found = self._reader.rows(rows.info.name, begin, begin + len(octets) // row_bytes)
        octets[:] = tensor_bytes(found.contiguous())


def _in_no_file(info: TensorInfo, begin: int, end: int | None) -> RowsInFile:
    shape = (info.shape[0] if end is None else end) - begin, *info.shape[1:]
    return RowsInFile(info, shape, NO_FILE, begin * _row_bytes(info))


def _row_bytes(info: TensorInfo) -> int:
    return prod(info.shape[1:]) * ITEM_BYTES[info.dtype]
