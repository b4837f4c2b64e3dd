"""One file to be written: its tensors one after another, and the bytes of its format before, between and after them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from gdagrow.header import ITEM_BYTES


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
class FileLayout:
    """One file to be written.

    tensors: In the order in which their bytes stand in the file.
    literals: Bytes of the format, each with the number of tensor bytes that stand before it; in order.
    """

    file: str
    tensors: tuple[TargetTensor, ...]
    literals: tuple[tuple[int, bytes], ...]

    @cached_property
    def data_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return self.data_bytes + sum(len(octets) for _, octets in self.literals)


def by_file(tensors: Iterable[TargetTensor], max_file_bytes: int) -> list[list[TargetTensor]]:
    """Deal tensors out to files in the order given, at most `max_file_bytes` to each; a larger one has its own."""
    groups: list[list[TargetTensor]] = [[]]
    group_bytes = 0
    for tensor in tensors:
        if groups[-1] and group_bytes + tensor.num_bytes > max_file_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.num_bytes
    return groups
