"""What carrying out a growth takes: the files that it writes, and the memory that it works in."""

import re
from typing import Final

from gdagrow.errors import RecipeError
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.file_writer import BLOCK_BYTES, NUM_BLOCKS
from gdagrow.formats.safetensors_layout import plan_shards
from gdagrow.growth import block_rows
from gdagrow.header import ITEM_BYTES
from gdagrow.plan import GrowthPlan, TensorPlan
from gdagrow.views import View

CHUNK_BYTES: Final = 8 * 2**20  # of output
NUM_CHUNKS: Final = 12  # in memory, whatever the model: kept, being grown or being written
KEPT_CHUNKS: Final = 8  # of them kept for further copies of their rows; the others never wait for these

# The most that the arithmetic of a split was seen to hold for each weight of a block, with up to 40 copies in every
# dtype: some 20 numbers of 8 bytes, and with noise for each copy a random word and two numbers made of it.
_SCRATCH_BYTES: Final = 20 * 8
_SCRATCH_BYTES_A_COPY: Final = 4 + 2 * 8
_SCRATCH_BYTES_FREE: Final = 4 + 8 + 8


def parse_size(text: str) -> int:
    """Read a size such as `5GB` (powers of ten), `512MiB` (powers of two) or a plain number of bytes.

    Raises:
        RecipeError: it is not one, or is less than a byte.
    """
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*(?:([KMGT])(i?)B?|B)?\s*", text, re.IGNORECASE)
    if found:
        number, prefix, binary = found.groups()
        power = " KMGT".index(prefix.upper()) if prefix else 0
        num_bytes = int(float(number) * (1024 if binary else 1000) ** power)
        if num_bytes >= 1:
            return num_bytes
    raise RecipeError(f"max-shard-size: expected a size such as 5GB, 500MB or 2GiB, got {text!r}")


def layout_of(plan: GrowthPlan, max_shard_bytes: int) -> tuple[FileLayout, ...]:
    """The files that a plan will write, byte for byte but for the weights."""
    targets = [TargetTensor(tensor.name, tensor.source.dtype, tensor.shape) for tensor in plan.tensors]
    return plan_shards(targets, max_shard_bytes, plan.header.metadata)


def peak_memory_bytes(plan: GrowthPlan) -> int:
    """About how much memory `expand` takes beside Python and torch: chunks, blocks being written, and scratch."""
    chunks = NUM_CHUNKS * max(_chunk_bytes(tensor) for tensor in plan.tensors)
    chunks = min(chunks, sum(tensor.num_bytes for tensor in plan.tensors))
    scratch = max(_scratch_bytes(tensor) for tensor in plan.tensors)
    if isinstance(plan.header, View):
        # Rows that lie in another order are copied together first.
        scratch += max(_chunk_bytes(tensor) for tensor in plan.tensors)
    return chunks + NUM_BLOCKS * BLOCK_BYTES + scratch


def _chunk_bytes(tensor: TensorPlan) -> int:
    row_bytes = tensor.growth.columns.size * ITEM_BYTES[tensor.source.dtype]
    return max(CHUNK_BYTES, block_rows(tensor.growth) * row_bytes)


def _scratch_bytes(tensor: TensorPlan) -> int:
    columns, rows = tensor.growth.columns, block_rows(tensor.growth)
    # Of free weights a random word and a float64; of whole rows of them, or of columns.
    whole = tensor.growth.rows.num_fresh or tensor.parted
    drawn = rows * (columns.size if whole else columns.num_fresh) * _SCRATCH_BYTES_FREE
    if not tensor.growth.splits:
        return drawn
    copies = max(segment.copies for segment in columns.segments)
    per_weight = _SCRATCH_BYTES + (copies * _SCRATCH_BYTES_A_COPY if tensor.noisy else 0)
    return drawn + rows * columns.old_size * per_weight
