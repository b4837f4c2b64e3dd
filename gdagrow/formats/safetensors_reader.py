"""Read rows of stored tensors straight from the mapped file, without holding the file in memory."""

import mmap
from math import prod
from typing import Final

import torch

from gdagrow.formats.weight_files import RowsInFile, WeightFiles

TORCH_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorReader(WeightFiles):
    """The floating-point tensors of a checkpoint, mapped row range by row range.

    Each tensor that is returned owns a mapping of just its own bytes: its pages leave this process when the tensor is
    dropped, and files larger than RAM need no address space reserved for them. While it lives it holds one file
    descriptor, also after the reader is closed. Writing to it never changes the file.
    """

    def tensor(self, name: str) -> torch.Tensor:
        """Return all of one tensor, as `rows` does."""
        return self._map(self.find(name))

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows `[begin, end)` along the leading dimension; all of a tensor that has no dimension.

        Returns:
            A view of the file's pages, to be read only, in the stored dtype and of shape `[end - begin, ...]`; a copy
            where the file does not align the rows to their item size.

        Raises:
            CheckpointError: the dtype is not a floating-point one that is read, or the shard changed on disk.
        """
        return self._map(self.find(name, begin, end))

    def _map(self, rows: RowsInFile) -> torch.Tensor:
        dtype, num_elements = TORCH_DTYPES[rows.info.dtype], prod(rows.shape)
        if not num_elements:
            return torch.empty(rows.shape, dtype=dtype)
        # A private writable mapping, since torch warns of buffers that it could not write to.
        skipped = rows.start % mmap.ALLOCATIONGRANULARITY
        num_bytes, offset = skipped + rows.num_bytes, rows.start - skipped
        try:
            mapped = mmap.mmap(rows.file, num_bytes, access=mmap.ACCESS_COPY, offset=offset)
        except OSError as error:
            raise self.unreadable(rows.info, "mapped", error) from None
        if rows.start % dtype.itemsize:
            octets = torch.frombuffer(mapped, dtype=torch.uint8, count=rows.num_bytes, offset=skipped)
            return octets.clone().view(dtype).view(rows.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=num_elements, offset=skipped).view(rows.shape)
