"""What a model costs to keep and to serve, and a growth to carry out: from shapes alone, no weight is read."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd, prod
from typing import Any, Final

from gdagrow.archs import Parameter, Sizes, trained_of
from gdagrow.axes import parse
from gdagrow.formats.file_layout import FileLayout
from gdagrow.header import ITEM_BYTES, Header
from gdagrow.layout import peak_memory_bytes
from gdagrow.plan import GrowthPlan
from gdagrow.rows import claim

PARTS: Final = ("embedding", "attention", "mlp", "norm", "head")

# Attention is counted for one token that looks back on this many.
CONTEXT_LENGTH: Final = 4096

# A parameter in training: four float32 numbers.
TRAINING_BYTES: Final = 4 * 4


@dataclass(frozen=True)
class ModelTensor:
    """What the figures need of a tensor, or of as many alike as there are layers.

    part, notation, dtype: Its part, its arrow notation and its safetensors dtype code.
    shape: Of one of them.
    num_alike: How many there are.
    """

    part: str
    notation: str
    dtype: str
    shape: tuple[int, ...]
    num_alike: int = 1

    @property
    def num_elements(self) -> int:
        return self.num_alike * prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class ModelFigures:
    """A model in numbers.

    sizes: Its heads and axes.
    tied: Whether the head reads the embedding's own tensor, which is then counted once, as `embedding`.
    parameters: Parameters by part.
    dtypes: Parameters by safetensors dtype code.
    weight_bytes: Bytes of all tensors.
    files: Bytes of each weight file, by name.
    kv_cache_bytes_per_token: Keys and values of one token in all layers, in the dtype of the weights that make them.
    matmul_flops_per_token: Forward, 2 for every weight of a matrix product; the head counts, the look-up does not.
    attention_flops_per_token: Forward, for one token that looks back on `context_length`; a group's noise once.
    context_length: Tokens that are looked back on.
    tensor_parallel_degrees: Ranks that get whole KV groups, whole query groups and equal shares of the FFN.
    """

    sizes: Sizes
    tied: bool
    parameters: Mapping[str, int]
    dtypes: Mapping[str, int]
    weight_bytes: int
    files: Mapping[str, int]
    kv_cache_bytes_per_token: int
    matmul_flops_per_token: int
    attention_flops_per_token: int
    context_length: int
    tensor_parallel_degrees: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> int:
        """Forward, weights and attention."""
        return self.matmul_flops_per_token + self.attention_flops_per_token

    @property
    def training_state_bytes(self) -> int:
        """Weights, gradients and the two moments of Adam, all in float32."""
        return self.num_parameters * TRAINING_BYTES

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        heads = self.sizes.heads
        counts = {"num_signal_heads": heads.num_signal_heads, "num_query_heads": heads.num_query_heads}
        return {**asdict(self), "heads": {**asdict(heads), **counts}, "num_parameters": self.num_parameters}


@dataclass(frozen=True)
class GrowthFigures:
    """A growth in numbers: both models, and the memory that `expand` needs beside Python and torch themselves."""

    source: ModelFigures
    grown: ModelFigures
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source.as_dict(), "grown": self.grown.as_dict(), "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip


def checkpoint_figures(header: Header) -> ModelFigures:
    """The figures of a checkpoint.

    Raises:
        CheckpointError: no table covers it, or its tensors do not fit the table.
    """
    architecture = trained_of(header.config)
    sizes = architecture.sizes(header.config)
    rows = claim(header, architecture, sizes)
    tensors = [
        ModelTensor(row.part, row.notation, header.tensors[name].dtype, header.tensors[name].shape)
        for name, row in rows.items()
    ]
    return _figures(tensors, sizes, header.shard_bytes, tied=architecture.is_tied(header.config))


def sized_figures(rows: Mapping[Parameter, str], sizes: Sizes, *, tied: bool) -> ModelFigures:
    """The figures of a model of any sizes, from its rows and the dtype code of each; it has no files."""
    tensors = [
        ModelTensor(
            row.part, row.notation, dtype, row.parsed.shape(sizes.axes), sizes.num_layers if row.is_layered else 1
        )
        for row, dtype in rows.items()
    ]
    return _figures(tensors, sizes, {}, tied=tied)


def growth_figures(plan: GrowthPlan, layouts: Sequence[FileLayout]) -> GrowthFigures:
    """The figures of a growth that writes these files."""
    tensors = [ModelTensor(t.part, t.notation, t.source.dtype, t.shape) for t in plan.tensors]
    files = {layout.file: layout.file_bytes for layout in layouts}
    grown = _figures(tensors, plan.after, files, tied=plan.tied_after)
    return GrowthFigures(checkpoint_figures(plan.header.stored), grown, peak_memory_bytes(plan))


def _figures(tensors: Iterable[ModelTensor], sizes: Sizes, files: Mapping[str, int], *, tied: bool) -> ModelFigures:
    parts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    weight_bytes = multiplied = cached = 0
    for tensor in tensors:
        parts[tensor.part] += tensor.num_elements
        dtypes[tensor.dtype] += tensor.num_elements
        weight_bytes += tensor.num_elements * ITEM_BYTES[tensor.dtype]
        if tensor.is_matrix and (tied or tensor.part != "embedding"):
            multiplied += tensor.num_elements
        if tensor.is_matrix and "kv" in parse(tensor.notation).axes(read=False):
            cached += tensor.num_alike * tensor.shape[0] * ITEM_BYTES[tensor.dtype]
    heads = sizes.heads
    shared = gcd(heads.num_groups, heads.num_kv_groups, sizes.ffn)
    return ModelFigures(
        sizes=sizes, tied=tied, parameters={part: parts[part] for part in PARTS if part in parts},
        dtypes=dict(sorted(dtypes.items())), weight_bytes=weight_bytes, files=files, kv_cache_bytes_per_token=cached,
        matmul_flops_per_token=2 * multiplied, attention_flops_per_token=_attention_flops(sizes, CONTEXT_LENGTH),
        context_length=CONTEXT_LENGTH,
        tensor_parallel_degrees=tuple(degree for degree in range(1, shared + 1) if shared % degree == 0),
    )  # fmt: skip


def _attention_flops(sizes: Sizes, context_length: int) -> int:
    """Scores over `head_dim` and values of their width, for each map: one a signal head, one a group's noise."""
    widths = sizes.head_dim + sizes.heads.value_heads * sizes.head_dim
    return sizes.num_layers * sizes.heads.num_query_heads * 2 * widths * context_length
