"""All that carrying out a growth writes: its files byte for byte, and what is streamed into them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gdagrow.formats.file_layout import FileLayout
from gdagrow.formats.safetensors_header import INDEX_FILE
from gdagrow.formats.safetensors_layout import index_json
from gdagrow.header import Header
from gdagrow.layout import layout_of
from gdagrow.plan import GrowthPlan
from gdagrow.split import Noise
from gdagrow.streaming import GrownTensor

WEIGHTS = "weights"


@dataclass(frozen=True)
class Output:
    """What an expansion writes.

    layouts: The files that are streamed.
    tensors: What is streamed into them, by the names of the layouts.
    sources: The headers of the files that it is streamed from, by `GrownTensor.files`.
    files: The content of small files, by name.
    carried: Names of files at the top of the source that belong to its training state and are copied as they are.
    record: What `growth.json` says of the training state, beside what it says of weights.
    """

    layouts: tuple[FileLayout, ...]
    tensors: Mapping[str, GrownTensor]
    sources: Mapping[str, Header]
    files: Mapping[str, bytes] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(layout.data_bytes for layout in self.layouts)


def weights_output(plan: GrowthPlan, max_shard_bytes: int) -> Output:
    """The weights alone, in safetensors files of at most `max_shard_bytes`, unless a single tensor is larger."""
    layouts = layout_of(plan, max_shard_bytes)
    files = {INDEX_FILE: index_json(layouts)} if len(layouts) > 1 else {}
    return Output(layouts, grown_weights(plan), {WEIGHTS: plan.header}, files)


def grown_weights(plan: GrowthPlan) -> dict[str, GrownTensor]:
    """What is streamed for every weight of a plan, by name."""
    recipe = plan.recipe
    noise = None if recipe.exact_copies else Noise(recipe.snr_db, recipe.seed)
    return {
        tensor.name: GrownTensor(
            tensor.name, WEIGHTS, tensor.source.name, tensor.source.dtype, tensor.growth,
            noise=noise if tensor.noisy else None,
        )
        for tensor in plan.tensors
    }  # fmt: skip
