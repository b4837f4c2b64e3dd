"""Grow a checkpoint of any kind: what kind it is, what a growth makes of all that it holds, and the growth itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gdagrow.checkpoint import read_checkpoint
from gdagrow.choices import Moments, Schedule
from gdagrow.dcp import DcpHeader
from gdagrow.errors import RecipeError
from gdagrow.hints import hints_of
from gdagrow.output import Output, weights_output
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import Recipe
from gdagrow.states.moments import OPTIMIZER_FILE, require_optimizer
from gdagrow.targets.like import with_derived_sizes

if TYPE_CHECKING:  # torch is only needed to carry a growth out, and takes longer to import than most plans to make
    from gdagrow.expand import Expansion, Progress

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Growing:
    """A growth that is ready to be carried out: the plan of its weights, and all that it writes."""

    plan: GrowthPlan
    output: Output

    @property
    def hints(self) -> tuple[str, ...]:
        """What a user may want to know before going on; never a refusal."""
        return (*hints_of(self.plan), *self.output.hints)


def prepare_growth(
    source: Path, recipe: Recipe, *, moments: Moments | str | None = None, schedule: Schedule | str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES, config: Path | None = None,
) -> Growing:  # fmt: skip
    """Plan a growth of everything in a checkpoint; nothing is written.

    Args:
        source: A directory with config.json and safetensors weights, and perhaps the training state of transformers'
            Trainer, whose `optimizer.pt` then grows too; or a torch distributed checkpoint, of which all grows.
        recipe: What to grow.
        moments: What becomes of optimizer moments: see `Moments`; by default `auto`.
        schedule: What becomes of the run's schedule: see `Schedule`; by default `keep`.
        max_shard_bytes: The largest weight file, unless a single tensor is larger.
        config: The `config.json` of a distributed checkpoint that has none, or a directory that has it.

    Raises:
        GdagrowError: the checkpoint cannot be read, or not be grown so.
    """
    header = read_checkpoint(source, config)
    recipe = with_derived_sizes(header.config, recipe)
    policy, course = Moments(moments or Moments.auto), Schedule(schedule or Schedule.keep)
    if isinstance(header, DcpHeader):
        if recipe.to is not None:
            raise RecipeError(f"to {recipe.to}: {source} is a distributed checkpoint; convert it to safetensors first")
        from gdagrow.states.dcp_checkpoint import dcp_output

        plan = make_plan(header, recipe)
        output = dcp_output(plan, moments=policy, schedule=course, max_file_bytes=max_shard_bytes)
    else:
        plan = make_plan(header, recipe)
        output = weights_output(plan, max_shard_bytes)
        if (source / OPTIMIZER_FILE).exists():
            from gdagrow.states.trainer_checkpoint import trainer_output

            output = trainer_output(plan, output, moments=policy, schedule=course)
        else:
            require_optimizer(source)
    if not output.record and (moments or schedule):
        asked = f"--moments {moments}" if moments else f"--schedule {schedule}"
        raise RecipeError(f"{source} has no training state, such as {OPTIMIZER_FILE}, for {asked}; leave it out")
    return Growing(plan, output)


def grow_checkpoint(
    source: Path, target: Path, recipe: Recipe, *, moments: Moments | str | None = None,
    schedule: Schedule | str | None = None, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    config: Path | None = None, progress: "Progress | None" = None,
) -> "Expansion":  # fmt: skip
    """Grow everything in a checkpoint into `target`, which appears whole or not at all: see `prepare_growth`.

    Args:
        progress: Called with the number of bytes written since its last call.
    """
    from gdagrow.expand import expand

    growing = prepare_growth(
        source, recipe, moments=moments, schedule=schedule, max_shard_bytes=max_shard_bytes, config=config
    )
    return expand(growing.plan, target, growing.output, progress=progress)
