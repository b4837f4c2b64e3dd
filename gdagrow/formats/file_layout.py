"""One file to be written: its tensors one after another, and the bytes of its format before, between and after them."""

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
