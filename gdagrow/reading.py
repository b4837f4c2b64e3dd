"""The reader that a header asks for: of the stored tensors, or of those that a view makes of them."""

from bisect import bisect_right
from itertools import accumulate
from math import prod
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from gdagrow.axes import IndexMap
from gdagrow.convert import INDEX_SHIFT, LAMBDAS, SUBLN, row_maps
from gdagrow.dcp import DcpHeader
from gdagrow.dcp_tensors import DcpTensors
from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.torch_file import TorchFileHeader, TorchFileReader
from gdagrow.formats.weight_files import NO_FILE, RowsInFile
from gdagrow.header import ITEM_BYTES, Header, TensorInfo
from gdagrow.lambda_init import moved_down, moved_norm


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
    return TensorReader(header) if header.view_of is None else ViewReader(header)


class ViewReader(TensorReader):
    """The tensors of a DiffLlama checkpoint in Motif's layout (see `gdagrow.convert`), row range by row range.

    Rows that are stored in another order are copied together, a run of them at a time; made tensors are computed, in
    float64; all others are read as they are stored.
    """

    def __init__(self, view: Header) -> None:
        super().__init__(view.stored)
        self._shapes = {name: info.shape for name, info in view.tensors.items()}
        self._maps = row_maps(view)
        self._made = {made.format(layer=layer): (made, layer)
                      for made in (*LAMBDAS, SUBLN) for layer in range(view.config["num_hidden_layers"])}  # fmt: skip

    def tensor(self, name: str) -> Tensor:
        if name in self._made:
            return self._make(*self._made[name])
        return self.rows(name, 0, self._shapes[name][0]) if name in self._maps else super().tensor(name)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        if name in self._made:
            return self._make(*self._made[name])[begin:end]
        if name not in self._maps:
            return super().rows(name, begin, end)
        parts = [super(ViewReader, self).rows(name, *run) for run in _runs_between(self._maps[name], begin, end)]
        return torch.cat(parts) if parts else super().rows(name, 0, 0)

    def _make(self, made: str, layer: int) -> Tensor:
        old, new = layer + INDEX_SHIFT, layer
        if made == SUBLN:
            return torch.full(self._shapes[made.format(layer=layer)], moved_norm(old, new), dtype=torch.float64)
        query, key = (super(ViewReader, self).tensor(name.format(layer=layer)).double().tolist() for name in LAMBDAS)
        moved = moved_down(query, key, old, new)
        return torch.tensor(moved[LAMBDAS.index(made)], dtype=torch.float64)


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
