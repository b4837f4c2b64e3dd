"""Grow a checkpoint of any kind: what kind it is, what a growth makes of all that it holds, and the growth itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gdagrow.checkpoint import read_checkpoint
from gdagrow.dcp import DcpHeader
from gdagrow.errors import CheckpointError, RecipeError
from gdagrow.moments import OPTIMIZER_FILE, SCHEDULER_FILE, Moments, Schedule
from gdagrow.output import Output, weights_output
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import Recipe

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
        return (*self.plan.hints, *self.output.hints)


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
    if isinstance(header, DcpHeader):
        if recipe.to is not None:
            raise RecipeError(f"to {recipe.to}: {source} is a distributed checkpoint; convert it to safetensors first")
        plan = make_plan(header, recipe)
        if not header.moments and (moments or schedule):
            raise _no_state(source, "moments in its tensors", moments, schedule)
        from gdagrow.dcp_checkpoint import dcp_output

        moments, schedule = Moments(moments or Moments.auto), Schedule(schedule or Schedule.keep)
        return Growing(plan, dcp_output(plan, moments=moments, schedule=schedule, max_file_bytes=max_shard_bytes))
    plan = make_plan(header, recipe)
    output = weights_output(plan, max_shard_bytes)
    if _has_training_state(source):
        from gdagrow.trainer_checkpoint import trainer_output

        moments, schedule = Moments(moments or Moments.auto), Schedule(schedule or Schedule.keep)
        output = trainer_output(plan, output, moments=moments, schedule=schedule)
    elif moments or schedule:
        raise _no_state(source, OPTIMIZER_FILE, moments, schedule)
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


def _has_training_state(directory: Path) -> bool:
    """Whether a directory holds an optimizer's state beside its weights.

    Raises:
        CheckpointError: it holds a schedule alone, which an engine would not restore without an optimizer.
    """
    optimizer, scheduler = ((directory / name).exists() for name in (OPTIMIZER_FILE, SCHEDULER_FILE))
    if scheduler and not optimizer:
        raise CheckpointError(
            f"{directory} has {SCHEDULER_FILE} and no {OPTIMIZER_FILE}: a run that goes on from it would lose its "
            f"schedule; bring {OPTIMIZER_FILE} back, or take the model alone with gdagrow export"
        )
    return optimizer


def _no_state(source: Path, what: str, moments: str | None, schedule: str | None) -> RecipeError:
    asked = f"--moments {moments}" if moments else f"--schedule {schedule}"
    return RecipeError(f"{source} has no training state ({what}) for {asked}; leave it out")
