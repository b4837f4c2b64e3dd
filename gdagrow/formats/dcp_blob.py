"""Find the numbers of a DCP chunk: where in its blob, a `torch.save` file of one tensor, the tensor's bytes lie.

Such a file is a zip of stored (never compressed) records: `data.pkl` says the tensor's dtype, shape, strides and which
record `data/0` holds its numbers. Source: torch's `serialization.py` and `_rebuild_tensor_v2`, `_v3` in `_utils.py`.
"""

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from io import RawIOBase, UnsupportedOperation
from math import prod
from typing import Any, Final
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from gdagrow.formats.dcp_metadata import DTYPE_CODES
from gdagrow.formats.pickle_tree import Made, Persistent, PickleRefusedError, parse
from gdagrow.header import ITEM_BYTES

_STORAGES: Final = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_UNTYPED: Final = "UntypedStorage"  # of the dtypes that came after these: the tensor says which
_ADMITTED: Final = frozenset(
    [("torch", name) for name in (*_STORAGES, *DTYPE_CODES)]
    + [("torch.storage", _UNTYPED), ("collections", "OrderedDict")]
    + [("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3")]
)  # fmt: skip
_MAX_PICKLE: Final = 2**16  # bytes of data.pkl; one tensor takes some 150
_LOCAL_HEADER: Final = struct.Struct("<4s5H3I2H")


class BlobError(ValueError):
    """What is wrong with a blob."""


@dataclass(frozen=True, slots=True)
class StridedBytes:
    """A tensor in a file: its safetensors dtype code, shape, strides in elements, and first byte.

    num_bytes: From its first element to its last.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def is_contiguous(self) -> bool:
        return self.num_bytes == prod(self.shape) * ITEM_BYTES[self.dtype] and self.strides == row_strides(self.shape)


def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, as torch counts them."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def locate(file: int, start: int, length: int) -> StridedBytes:
    """Find the tensor in the blob of `length` bytes from byte `start` of an open file.

    Raises:
        BlobError: it is no `torch.save` file of one tensor, or the tensor reaches beyond its storage.
        OSError: the file cannot be read.
    """
    try:
        with ZipFile(_Slice(file, start, length)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if len(records) != len(archive.infolist()) or "data.pkl" not in records:
                raise BlobError("it is no file of torch.save")
            if any(info.compress_type != ZIP_STORED or info.flag_bits & 1 for info in records.values()):
                raise BlobError("its records are compressed")
            if records["data.pkl"].file_size > _MAX_PICKLE:
                raise BlobError("it holds more than one tensor")
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise BlobError("it was written on a big-endian machine")
            tensor = _tensor(archive.read(records["data.pkl"]))
            if tensor.record not in records:
                raise BlobError("its numbers are missing")
            data = records[tensor.record]
            if data.file_size != tensor.storage_bytes:
                raise BlobError(f"expected {tensor.storage_bytes} bytes of numbers, got {data.file_size}")
            first = start + _data_start(file, start, length, data) + tensor.skipped
            return StridedBytes(tensor.dtype, tensor.shape, tensor.strides, first, tensor.num_bytes)
    except PickleRefusedError as error:
        raise BlobError(f"its pickle {error}; nothing in it was run") from None
    except (
        BadZipFile,
        NotImplementedError,
        EOFError,
        struct.error,
        UnsupportedOperation,
        ValueError,
        RuntimeError,
    ) as error:
        if isinstance(error, BlobError):
            raise
        raise BlobError("it is no file of torch.save, or damaged") from None


class _Slice(RawIOBase):
    """A part of an open file, read as a file of its own."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError("before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._at))
        found = os.pread(self._file, wanted, self._start + self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def _data_start(file: int, start: int, length: int, record: ZipInfo) -> int:
    """Where in the blob a record's bytes begin, past the header that stands before them."""
    header = os.pread(file, _LOCAL_HEADER.size, start + record.header_offset)
    fields = _LOCAL_HEADER.unpack(header)
    begin: int = record.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
    if fields[0] != b"PK\x03\x04" or record.header_offset < 0 or begin + record.file_size > length:
        raise BlobError("its records lie outside it")
    return begin


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What `data.pkl` says; bytes count from the beginning of the record."""

    record: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_bytes: int
    skipped: int
    num_bytes: int


@lru_cache(maxsize=1024)  # the chunks of equal parameters have equal pickles
def _tensor(pickle: bytes) -> _Tensor:
    made = parse(pickle, _ADMITTED)
    if type(made) is not Made or not made.function.name.startswith("_rebuild_tensor") or len(made.args) < 6:
        raise BlobError("it holds something else than one plain tensor")
    storage, offset, shape, strides = made.args[:4]
    if type(storage) is not Persistent or type(storage.id) is not tuple or len(storage.id) != 5:
        raise BlobError("its tensor has no storage")
    _, storage_type, record, _, size = storage.id
    kind = getattr(storage_type, "name", "")
    dtype = (
        DTYPE_CODES.get(getattr(made.args[6:7] and made.args[6], "name", ""))
        if kind == _UNTYPED
        else _STORAGES.get(kind)
    )
    if dtype is None or type(record) is not str:
        raise BlobError("its tensor has no storage that is read")
    if not (_are_sizes(shape) and _are_sizes(strides) and _are_sizes((offset, size)) and len(shape) == len(strides)):
        raise BlobError("expected sizes and strides of whole numbers")
    item = ITEM_BYTES[dtype]
    storage_bytes = size if kind == _UNTYPED else size * item
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if prod(shape) else 0
    if (offset + reach) * item > storage_bytes:
        raise BlobError("its tensor reaches beyond its storage")
    return _Tensor(f"data/{record}", dtype, shape, strides, storage_bytes, offset * item, reach * item)


def _are_sizes(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is int and 0 <= item < 2**62 for item in value)
