"""Grow a checkpoint of any kind: what kind it is, what a growth makes of all that it holds, and the growth itself."""

from dataclasses import dataclass
from pathlib import Path

from gdagrow.expand import Expansion, Progress, expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.output import Output, weights_output
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import Recipe

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Growing:
    """A growth that is ready to be carried out: the plan of its weights, and all that it writes."""

    plan: GrowthPlan
    output: Output


def prepare_growth(source: Path, recipe: Recipe, *, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> Growing:
    """Plan a growth of everything in a checkpoint; nothing is written.

    Args:
        source: A directory with config.json and safetensors weights.
        recipe: What to grow.
        max_shard_bytes: The largest weight file, unless a single tensor is larger.

    Raises:
        GdagrowError: the checkpoint cannot be read, or not be grown so.
    """
    plan = make_plan(read_header(source), recipe)
    return Growing(plan, weights_output(plan, max_shard_bytes))


def grow_checkpoint(
    source: Path, target: Path, recipe: Recipe, *, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Expansion:  # fmt: skip
    """Grow everything in a checkpoint into `target`, which appears whole or not at all: see `prepare_growth`.

    Args:
        progress: Called with the number of bytes written since its last call.
    """
    growing = prepare_growth(source, recipe, max_shard_bytes=max_shard_bytes)
    return expand(growing.plan, target, growing.output, progress=progress)
