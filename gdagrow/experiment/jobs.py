"""One run of an experiment: begun from new weights or from a state of another run, trained, measured, tidied up."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gdagrow.errors import DivergedError, TrainError
from gdagrow.train.beginning import write_recipe
from gdagrow.train.data import open_tokens, prepare_tokens
from gdagrow.train.metrics import MetricsFile, metrics_lines
from gdagrow.train.recipe import TrainRecipe, read_train_recipe
from gdagrow.train.run_directory import (
    METRICS_FILE,
    MODEL,
    RECIPE_FILE,
    TOKENS,
    checkpoint_name,
    last_state,
    states,
)

MAPS_FILE: Final = "maps.json"
DIVERGED_FILE: Final = "diverged.json"
_VOCAB: Final = 2**16  # a bound; the training looks at every token


@dataclass(frozen=True)
class Job:
    """One run.

    told: What it is, for people.
    directory: Its run directory. recipe: Its training recipe.
    forked_from, fork_at: The run, and its step, from whose state it goes on.
    states_kept: Steps whose states stay when it is done, because others go on from them.
    map_every, map_sequences: Steps between two measurements of its attention maps, and sequences for it; 0 for none.
    may_diverge: Whether a loss that is not finite is a result, as in a sweep of learning rates.
    """

    told: str
    directory: Path
    recipe: TrainRecipe
    forked_from: Path | None = None
    fork_at: int = 0
    states_kept: tuple[int, ...] = ()
    map_every: int = 0
    map_sequences: int = 0
    may_diverge: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        measured = not self.map_every or (self.directory / MAPS_FILE).exists()
        return (self.directory / DIVERGED_FILE).exists() or ((self.directory / MODEL).exists() and measured)

    @property
    def mapped_steps(self) -> list[int]:
        """Those after which its attention maps are measured."""
        if not self.map_every:
            return []
        steps = self.recipe.steps
        return sorted(step for step in {*range(0, steps, self.map_every), steps} if step > self.fork_at)

    @property
    def steps(self) -> int:
        """Those that it trains itself."""
        return self.recipe.steps - self.fork_at


def require_same(job: Job) -> None:
    """Raises TrainError if the run in a job's directory was begun as another one."""
    path = job.directory / RECIPE_FILE
    if not path.exists():
        return
    before, now = read_train_recipe(path).model_dump(), job.recipe.model_dump()
    # Where the text lies may change; that it is the same text is known before.
    differ = [key for key in now if key not in ("data", "keep") and before[key] != now[key]]
    if job.map_every and (maps := job.directory / MAPS_FILE).exists():
        differ += ["maps"] * ([entry["step"] for entry in json.loads(maps.read_bytes())] != job.mapped_steps)
    if differ:
        raise TrainError(
            f"{job.directory} was run with another {', '.join(differ)} than the recipe says; remove it to run it "
            "again, or choose another --out"
        )


def run_job(job: Job, tick: Callable[[int], None]) -> None:
    """Run a job from wherever it stands to its end; `tick` is told of every step.

    Raises:
        GdagrowError: it cannot be trained or measured, or its loss is not finite.
    """
    if job.is_done:
        return
    _find_text(job)
    if not (job.directory / MODEL).exists():
        try:
            _train(job, tick)
        except DivergedError as error:
            if not job.may_diverge:
                what = str(error).partition(";")[0]  # what to do about it is another thing here
                raise TrainError(f"{what}; lower the learning rate, remove {job.directory}, and run it again") from None
            _write_json(job.directory / DIVERGED_FILE, {"error": str(error)})
            _remove_states(job)
            return
    if job.map_every:
        _write_json(job.directory / MAPS_FILE, _measured_maps(job))
    _remove_states(job)


def _find_text(job: Job) -> None:
    """Let a run go on whose experiment was moved: it knows where its text was."""
    path = job.directory / RECIPE_FILE
    if path.exists() and read_train_recipe(path).data != job.recipe.data:
        shutil.rmtree(job.directory / TOKENS, ignore_errors=True)
        prepare_tokens(job.recipe.data, job.directory / TOKENS, _VOCAB, None)
        write_recipe(job.recipe, path)


def _train(job: Job, tick: Callable[[int], None]) -> None:
    from gdagrow.train.run import train

    if job.forked_from is not None and last_state(job.directory) is None:
        _fork(job, job.forked_from)
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    train(job.recipe, job.directory, resume=True, restart=False, watcher=_Watcher(tick))


class _Watcher:
    """Tells of steps alone; a run's lines are read from its file."""

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.step = tick

    def line(self, line: Any) -> None:
        pass


def _fork(job: Job, source: Path) -> None:
    """Make a run directory that stands where another run stood, whole or not at all."""
    state = source / checkpoint_name(job.fork_at)
    if not state.is_dir():
        raise TrainError(f"{state}, from which {job.told} goes on, is gone; remove {source} to run it again")
    partial = job.directory.with_name(f".{job.directory.name}.partial")
    for left in (partial, job.directory):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(state, partial / state.name)
    write_recipe(job.recipe, partial / RECIPE_FILE)
    shutil.copyfile(source / METRICS_FILE, partial / METRICS_FILE)
    MetricsFile(partial / METRICS_FILE, job.fork_at)  # what came later is not this run's
    os.rename(partial, job.directory)


def _measured_maps(job: Job) -> list[dict[str, Any]]:
    import torch

    from gdagrow.experiment.maps import measure_maps

    found = {state.step: state for state in states(job.directory) if not state.grown}
    if gone := [step for step in job.mapped_steps if step not in found]:
        raise TrainError(
            f"{job.directory} has no state any more after step {gone[0]}, whose attention maps are to be measured; "
            "remove it to run it again"
        )
    _, held_out = open_tokens(job.recipe.data, job.directory / TOKENS, job.recipe.context_length, _VOCAB)
    assert held_out is not None
    tokens = torch.stack([held_out[index]["input_ids"] for index in range(min(job.map_sequences, len(held_out)))])
    return [{"step": step, "layers": list(measure_maps(found[step].directory, tokens))} for step in job.mapped_steps]


def _remove_states(job: Job) -> None:
    for state in states(job.directory):
        if state.grown or state.step not in job.states_kept:
            shutil.rmtree(state.directory)


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)


def lines_of(job: Job) -> list[dict[str, Any]]:
    """The figures of a run, a line each."""
    return metrics_lines(job.directory / METRICS_FILE)
