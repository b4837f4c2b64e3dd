"""The tensors of a DCP directory by the names that its header gives them.

    header = read_dcp(directory)
    with DcpTensors(header) as reader:
        weight = reader.rows("model.norm.weight", 0, 8)
        moment = reader.tensor(header.moments["model.norm.weight", "exp_avg"].name)
        rate = reader.blob("optim.param_groups.0.lr")

What is written back goes through `gdagrow.formats.dcp_layout.plan_dcp`, under the keys `header.names.weight_key(name)`
and `header.names.moment_key(name, kind)`, with the paths of `header.path(...)`.
"""

import torch
from torch import Tensor
from typing_extensions import Self

from gdagrow.archs import architecture_of
from gdagrow.dcp import DcpHeader
from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_reader import DcpReader


class DcpTensors:
    """The tensors of a DCP directory, as `TensorReader` has those of safetensors files.

    Weights go by parameter name, all others (moments, carried ones) by key, which is the name of their `TensorInfo`.
    """

    def __init__(self, header: DcpHeader) -> None:
        self._keys = header.names.weights
        self._reader = DcpReader(header.dcp)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def tensor(self, name: str) -> Tensor:
        """Return all of one tensor, as `DcpReader.rows` does."""
        return self._reader.tensor(self._keys.get(name, name))

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Return rows `[begin, end)` of a tensor, as `DcpReader.rows` does."""
        return self._reader.rows(self._keys.get(name, name), begin, end)

    def blob(self, key: str) -> bytes:
        """Return a value that is no tensor, as `DcpReader.blob` does."""
        return self._reader.blob(key)


def require_tied(header: DcpHeader, reader: DcpTensors, chunk_bytes: int = 8 * 2**20) -> None:
    """Check that a tied head that was saved beside the embedding is equal to it; reads both, a few rows at a time.

    Raises:
        CheckpointError: they differ, so that one of them would be lost.
    """
    if header.tied_head is None:
        return
    embedding = header.names.weights[architecture_of(header.config).embedding]
    stored = header.dcp.tensors[embedding]
    step = max(1, chunk_bytes * stored.shape[0] // stored.num_bytes)
    for begin in range(0, stored.shape[0], step):
        end = min(begin + step, stored.shape[0])
        ours, theirs = (reader.rows(key, begin, end).view(torch.uint8) for key in (embedding, header.tied_head))
        if not torch.equal(ours, theirs):
            raise CheckpointError(
                f"{header.directory}: config.json ties the head to the embedding, but {header.tied_head!r} and "
                f"{embedding!r} differ in rows {begin} to {end - 1}; set tie_word_embeddings to false if the model was "
                "trained untied"
            )
