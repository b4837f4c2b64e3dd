"""The reader that a header asks for: of the stored tensors, or of those that a view makes of them."""

from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from gdagrow.dcp import DcpHeader
from gdagrow.dcp_tensors import DcpTensors
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.formats.torch_file import TorchFileHeader, TorchFileReader
from gdagrow.header import Header
from gdagrow.views import Made, Seen, View, Zeros


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
    return ViewReader(header) if isinstance(header, View) else TensorReader(header)


class ViewReader:
    """The tensors of a view (see `gdagrow.views`), row range by row range.

    Rows that lie in another order are copied together, a run of them at a time; made tensors are computed, in float64.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._under = open_reader(view.under)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._under.close()

    def tensor(self, name: str) -> Tensor:
        """Return all of one tensor."""
        how = self._view.derived[name]
        if isinstance(how, Made):
            return torch.tensor(how.make(*self._values(how.names)), dtype=torch.float64)
        if isinstance(how, Seen) and how.rows is None:
            return self._under.tensor(how.name)
        return self.rows(name, 0, self._view.tensors[name].shape[0])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Return rows `[begin, end)` of a tensor."""
        how = self._view.derived[name]
        if isinstance(how, Made):
            return self.tensor(name)[begin:end]
        if isinstance(how, Zeros):
            info = self._view.tensors[name]
            return torch.zeros((end - begin, *info.shape[1:]), dtype=DTYPES[info.dtype])
        if how.rows is None:
            return self._under.rows(how.name, begin, end)
        parts = [self._under.rows(how.name, *run) for run in how.rows.runs_between(begin, end)]
        return torch.cat(parts) if parts else self._under.rows(how.name, 0, 0)

    def _values(self, names: tuple[str, ...]) -> list[list[float]]:
        return [self._under.tensor(name).double().tolist() for name in names]
