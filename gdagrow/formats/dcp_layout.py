"""Lay out a DCP directory that is written as a stream: `.distcp` files whose blobs torch itself reads, and `.metadata`.

Any number of ranks can load it: a chunk is at most some whole rows of a tensor, and DCP reads the chunks that a rank
needs. The bytes around a chunk's numbers are those that `torch.save` writes around them.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod
from tempfile import TemporaryFile
from typing import Final

import torch

from gdagrow.formats.dcp_blob import locate
from gdagrow.formats.dcp_metadata import Blob, Chunk, StoredTensor
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.header import ITEM_BYTES

# Whole rows, at most so many bytes of them: what a rank reads too much at each end of its part, and holds meanwhile.
MAX_CHUNK_BYTES: Final = 256 * 2**20
_ALIGNMENT: Final = 64  # of a blob in its file, as torch aligns the numbers in a blob
_VERSION: Final = "1.0.0"


@dataclass(frozen=True)
class DcpLayout:
    """A DCP directory to be written: its files, and the content of `.metadata`, which is to be written last."""

    files: tuple[FileLayout, ...]
    metadata: bytes


def plan_dcp(
    tensors: Sequence[TargetTensor],
    blobs: Mapping[str, bytes],
    paths: Mapping[str, tuple[str | int, ...]],
    max_file_bytes: int,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> DcpLayout:
    """Fill files with `tensors` in the order given, at most `max_file_bytes` of tensors in each.

    A tensor larger than that has a file of its own. Every tensor is aligned to 64 bytes, so that it can be mapped.

    Args:
        tensors: Under their keys.
        blobs: Values that are no tensors, by key, as they are stored; they go into the first file.
        paths: Key to its path in the nested state dict; for a key that is not here, the key itself.
        max_file_bytes: The largest file, but for the bytes around tensors.
        max_chunk_bytes: The largest chunk, unless a single row is larger.
    """
    groups: list[list[TargetTensor]] = [[]]
    group_bytes = 0
    for tensor in tensors:
        if groups[-1] and group_bytes + tensor.num_bytes > max_file_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(tensor)
        group_bytes += tensor.num_bytes
    places: dict[str, Blob] = {}
    stored: list[StoredTensor] = []
    files = []
    for number, group in enumerate(groups):
        file = _GrowingFile(f"__0_{number}.distcp", max_chunk_bytes)
        if number == 0:
            places |= {key: file.add_blob(octets) for key, octets in blobs.items()}
        stored += [file.add_tensor(tensor) for tensor in group]
        files.append(file.layout(group))
    return DcpLayout(tuple(files), _metadata(stored, places, paths))


class _GrowingFile:
    """One file as it fills."""

    def __init__(self, name: str, max_chunk_bytes: int) -> None:
        self._name = name
        self._max_chunk_bytes = max_chunk_bytes
        self._literals: list[tuple[int, bytes]] = []
        self._data_bytes = 0
        self._at = 0

    def layout(self, tensors: Sequence[TargetTensor]) -> FileLayout:
        return FileLayout(self._name, tuple(tensors), tuple(self._literals))

    def add_blob(self, octets: bytes) -> Blob:
        start = self._at
        self._put(octets)
        return Blob(self._name, start, len(octets))

    def add_tensor(self, tensor: TargetTensor) -> StoredTensor:
        chunks = tuple(self._add_chunk(tensor, begin, end) for begin, end in self._cuts(tensor))
        return StoredTensor(tensor.name, tensor.dtype, tensor.shape, chunks)

    def _cuts(self, tensor: TargetTensor) -> Iterator[tuple[int, int]]:
        if not tensor.num_bytes or not tensor.shape:
            yield 0, tensor.shape[0] if tensor.shape else 0
            return
        rows = max(1, self._max_chunk_bytes // (tensor.num_bytes // tensor.shape[0]))
        for begin in range(0, tensor.shape[0], rows):
            yield begin, min(begin + rows, tensor.shape[0])

    def _add_chunk(self, tensor: TargetTensor, begin: int, end: int) -> Chunk:
        sizes = (end - begin, *tensor.shape[1:]) if tensor.shape else ()
        before, after = _around(tensor.dtype, sizes)
        self._put(bytes(-self._at % _ALIGNMENT))
        start = self._at
        self._put(before)
        num_bytes = prod(sizes) * ITEM_BYTES[tensor.dtype]
        self._data_bytes += num_bytes
        self._at += num_bytes
        self._put(after)
        offsets = (begin, *(0 for _ in sizes[1:])) if sizes else ()
        return Chunk(offsets, sizes, Blob(self._name, start, self._at - start))

    def _put(self, octets: bytes) -> None:
        if octets:
            self._literals.append((self._data_bytes, octets))
            self._at += len(octets)


@lru_cache(maxsize=256)  # a model has few shapes
def _around(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The bytes that `torch.save` writes before and after the numbers of a tensor."""
    with TemporaryFile() as file:
        # Torch leaves a hole in the file, and never touches the memory of the tensor. (A fake tensor would do, and take
        # the import of torch's compiler.)
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=DTYPES[dtype]), file)
        length = file.seek(0, 2)
        found = locate(file.fileno(), 0, length)
        file.seek(0)
        before = file.read(found.start)
        file.seek(found.start + found.num_bytes)
        return before, file.read()


def _metadata(
    tensors: Sequence[StoredTensor], blobs: Mapping[str, Blob], paths: Mapping[str, tuple[str | int, ...]]
) -> bytes:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    keys: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places = {}
    for tensor in tensors:
        boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
        properties = TensorProperties(dtype=DTYPES[tensor.dtype])
        keys[tensor.key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
        for number, chunk in enumerate(tensor.chunks):
            blob = chunk.blob
            index = MetadataIndex(tensor.key, chunk.offsets, number)
            places[index] = _StorageInfo(blob.file, blob.start, blob.length)
    for key, blob in blobs.items():
        keys[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(blob.file, blob.start, blob.length)
    metadata = Metadata(keys, {key: paths.get(key, (key,)) for key in keys}, places, StorageMeta())
    if "version" in (field.name for field in fields(Metadata)):  # older torch has none, and reads it all the same
        metadata.version = _VERSION
    return pickle.dumps(metadata, protocol=4)
