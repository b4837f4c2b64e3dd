"""Read rows of stored tensors, without holding their file in memory."""

from typing import Final

import torch

from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.weight_files import RowsInFile, WeightFiles

TORCH_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorReader(WeightFiles):
    """The floating-point tensors of a checkpoint, read row range by row range.

    Into memory, and not mapped: what is mapped of a file that is cut off meanwhile, or that the disk cannot give, ends
    the process when it is touched.
    """

    def tensor(self, name: str) -> torch.Tensor:
        """Return all of one tensor, as `rows` does."""
        return self._read(self.find(name))

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows `[begin, end)` along the leading dimension; all of a tensor that has no dimension.

        Returns:
            A tensor of the stored dtype and of shape `[end - begin, ...]`.

        Raises:
            CheckpointError: the dtype is not a floating-point one that is read, the shard changed on disk, or the disk
                cannot give it.
        """
        return self._read(self.find(name, begin, end))

    def _read(self, rows: RowsInFile) -> torch.Tensor:
        octets = torch.empty(rows.num_bytes, dtype=torch.uint8)
        self.read(rows, 0, tensor_bytes(octets))
        return octets.view(TORCH_DTYPES[rows.info.dtype]).view(rows.shape)
