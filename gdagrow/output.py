"""All that carrying out a growth writes: its files byte for byte, and what is streamed into them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.safetensors_header import INDEX_FILE
from gdagrow.formats.safetensors_layout import index_json
from gdagrow.growth import TensorGrowth
from gdagrow.header import ITEM_BYTES, Header
from gdagrow.layout import layout_of
from gdagrow.plan import GrowthPlan

WEIGHTS = "weights"


@dataclass(frozen=True)
class GrownTensor:
    """A tensor to be streamed.

    name: Its name, which decides the random words of its noise.
    files: Which of the readers has the stored tensor; None for one that is all zeros.
    source: The stored tensor's name there.
    dtype: Safetensors dtype code, the stored tensor's own.
    growth: Its index maps.
    power: None for a weight; for an optimizer moment, the power of the copies that it is divided by.
    factor: What a moment is multiplied by besides.
    noisy: Whether what is split gets zero-sum noise.
    parted: Whether copies of rows are told apart (`gdagrow.engine.part_rows`).
    """

    name: str
    files: str | None
    source: str
    dtype: str
    growth: TensorGrowth
    power: int | None = None
    factor: float = 1.0
    noisy: bool = False
    parted: bool = False

    @property
    def target(self) -> TargetTensor:
        return TargetTensor(self.name, self.dtype, self.growth.shape)

    @property
    def row_bytes(self) -> int:
        return self.growth.columns.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Output:
    """What an expansion writes.

    layouts: The files that are streamed.
    tensors: What is streamed into them, by the names of the layouts.
    sources: The headers of the files that it is streamed from, by `GrownTensor.files`.
    files: The content of small files, by name.
    carried: Names of files at the top of the source that belong to its training state and are copied as they are.
    record: What `growth.json` says of the training state, beside what it says of weights.
    hints: What a user may want to know before going on, beside the plan's.
    """

    layouts: tuple[FileLayout, ...]
    tensors: Mapping[str, GrownTensor]
    sources: Mapping[str, Header]
    files: Mapping[str, bytes] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    record: Mapping[str, Any] = field(default_factory=dict)
    hints: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(layout.data_bytes for layout in self.layouts)

    @property
    def moments(self) -> tuple[TargetTensor, ...]:
        """The optimizer moments that are grown."""
        return tuple(tensor.target for tensor in self.tensors.values() if tensor.power is not None and tensor.files)


def weights_output(plan: GrowthPlan, max_shard_bytes: int) -> Output:
    """The weights alone, in safetensors files of at most `max_shard_bytes`, unless a single tensor is larger."""
    layouts = layout_of(plan, max_shard_bytes)
    files = {INDEX_FILE: index_json(layouts)} if len(layouts) > 1 else {}
    return Output(layouts, grown_weights(plan), {WEIGHTS: plan.header}, files)


def grown_weights(plan: GrowthPlan) -> dict[str, GrownTensor]:
    """What is streamed for every weight of a plan, by name."""
    grown = (
        GrownTensor(
            tensor.name, None if tensor.is_zero else WEIGHTS, tensor.source.name, tensor.source.dtype, tensor.growth,
            noisy=tensor.noisy, parted=tensor.parted,
        )
        for tensor in plan.tensors
    )  # fmt: skip
    return {tensor.name: tensor for tensor in grown}
