"""Read rows of the tensors in a DCP directory, whatever chunks they were saved in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from math import prod
from types import TracebackType
from typing import Final

import torch
from typing_extensions import Self

from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_blob import BlobError, StridedBytes, locate
from gdagrow.formats.dcp_metadata import Blob, Chunk, DcpMetadata, StoredTensor
from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.formats.watched import file_stat

_LOCATED: Final = 4096  # chunks whose place is remembered; rows are read in order, so that each is found about once


class DcpReader:
    """The tensors and values of a DCP directory by their keys.

    Files are opened when rows are read, so that any number of them will do; several threads may read at once.
    """

    def __init__(self, stored: DcpMetadata) -> None:
        self._stored = stored
        self._locate = lru_cache(maxsize=_LOCATED)(self._locate_chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget what was found; no file is held open."""
        self._locate.cache_clear()

    def tensor(self, key: str) -> torch.Tensor:
        """Return all of one tensor, as `rows` does."""
        shape = self._stored.tensors[key].shape
        return self.rows(key, 0, shape[0] if shape else 1)

    def rows(self, key: str, begin: int, end: int) -> torch.Tensor:
        """Return rows `[begin, end)` along the leading dimension; all of a tensor that has no dimension.

        Returns:
            A contiguous tensor in the stored dtype and of shape `[end - begin, ...]`, to be read only.

        Raises:
            CheckpointError: a chunk is not what the metadata says, or its file changed.
        """
        tensor = self._stored.tensors[key]
        shape = (end - begin, *tensor.shape[1:]) if tensor.shape else ()
        assert not shape or 0 <= begin <= end <= tensor.shape[0], f"rows [{begin}, {end}) of {key} {tensor.shape}"
        if not prod(shape):
            return torch.empty(shape, dtype=DTYPES[tensor.dtype])
        chunks = [chunk for chunk in tensor.chunks if _overlaps(chunk, begin, end)]
        if len(chunks) == 1:
            return self._chunk_rows(tensor, chunks[0], begin, end).contiguous()
        rows = torch.empty(shape, dtype=DTYPES[tensor.dtype])
        for chunk in chunks:
            part = self._chunk_rows(tensor, chunk, begin, end)
            first = max(chunk.offsets[0] - begin, 0)
            places = [slice(first, first + part.shape[0])]
            places += [slice(at, at + size) for at, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            rows[tuple(places)] = part
        return rows

    def blob(self, key: str) -> bytes:
        """Return a value that is no tensor as it is stored: a pickle, to be carried and never to be loaded.

        Raises:
            CheckpointError: the file changed or cannot be read.
        """
        blob = self._stored.blobs[key]
        with self._opened(blob) as file:
            octets = os.pread(file, blob.length, blob.start)
        if len(octets) != blob.length:
            raise self._changed(blob)
        return octets

    def _chunk_rows(self, tensor: StoredTensor, chunk: Chunk, begin: int, end: int) -> torch.Tensor:
        """The part of rows `[begin, end)` of a tensor that a chunk holds."""
        found = self._locate(tensor.key, chunk)
        if not chunk.sizes:
            return self._read(chunk.blob, found)
        first = max(begin - chunk.offsets[0], 0)
        last = min(end - chunk.offsets[0], chunk.sizes[0])
        if not found.is_contiguous:
            return self._read(chunk.blob, found)[first:last]
        row_bytes = found.num_bytes // chunk.sizes[0]
        part = replace(found, shape=(last - first, *found.shape[1:]), start=found.start + first * row_bytes,
                       num_bytes=(last - first) * row_bytes)  # fmt: skip
        return self._read(chunk.blob, part)

    def _read(self, blob: Blob, found: StridedBytes) -> torch.Tensor:
        octets = torch.empty(found.num_bytes, dtype=torch.uint8)
        left, start = tensor_bytes(octets), found.start
        with self._opened(blob) as file:
            while left:
                if not (count := os.preadv(file, [left], start)):
                    raise self._changed(blob)
                left, start = left[count:], start + count
        return octets.view(DTYPES[found.dtype]).as_strided(found.shape, found.strides)

    def _locate_chunk(self, key: str, chunk: Chunk) -> StridedBytes:
        tensor, what = self._stored.tensors[key], ""
        with self._opened(chunk.blob) as file:
            try:
                found = locate(file, chunk.blob.start, chunk.blob.length)
                if (found.dtype, found.shape) == (tensor.dtype, chunk.sizes):
                    return found
                what = f"expected {tensor.dtype} of {list(chunk.sizes)}, got {found.dtype} of {list(found.shape)}"
            except BlobError as error:
                what = str(error)
        path = self._stored.directory / chunk.blob.file
        raise CheckpointError(f"{path}: the chunk of {key!r} at {list(chunk.offsets)}: {what}; restore the file")

    @contextmanager
    def _opened(self, blob: Blob) -> Iterator[int]:
        path = self._stored.directory / blob.file
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if file_stat(os.fstat(file)) != self._stored.files[blob.file]:
                    raise self._changed(blob)
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None

    def _changed(self, blob: Blob) -> CheckpointError:
        return CheckpointError(
            f"{self._stored.directory / blob.file} changed since its directory was read; let nothing write to the "
            "source, and start again"
        )


def _overlaps(chunk: Chunk, begin: int, end: int) -> bool:
    return not chunk.sizes or (chunk.offsets[0] < end and begin < chunk.offsets[0] + chunk.sizes[0])
