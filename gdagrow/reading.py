"""The reader that a checkpoint's header asks for: of the stored tensors, or of those that a view makes of them."""

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor

from gdagrow.axes import IndexMap
from gdagrow.convert import INDEX_SHIFT, LAMBDAS, SUBLN, row_maps
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.safetensors_writer import tensor_bytes
from gdagrow.header import Header
from gdagrow.lambda_init import moved_down, moved_norm


def open_reader(header: Header) -> TensorReader:
    """Open the weight files of a checkpoint.

    Raises:
        CheckpointError: a shard is gone, or its header is no longer the one that was read.
    """
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

    def read_into(self, octets: memoryview, name: str, begin: int = 0, end: int | None = None) -> None:
        end = self._shapes[name][0] if end is None else end
        if name in self._made:
            octets[:] = tensor_bytes(self._make(*self._made[name])[begin:end])
            return
        if name not in self._maps:
            super().read_into(octets, name, begin, end)
            return
        row_bytes, at = len(octets) // max(1, end - begin), 0
        for first, last in _runs_between(self._maps[name], begin, end):
            num_bytes = (last - first) * row_bytes
            super().read_into(octets[at : at + num_bytes], name, first, last)
            at += num_bytes

    def _make(self, made: str, layer: int) -> Tensor:
        old, new = layer + INDEX_SHIFT, layer
        if made == SUBLN:
            return torch.full(self._shapes[made.format(layer=layer)], moved_norm(old, new), dtype=torch.float64)
        query, key = (super(ViewReader, self).tensor(name.format(layer=layer)).double().tolist() for name in LAMBDAS)
        moved = moved_down(query, key, old, new)
        return torch.tensor(moved[LAMBDAS.index(made)], dtype=torch.float64)


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
