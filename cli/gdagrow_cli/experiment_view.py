"""`gdagrow experiment`: what it would run, its progress, and what it says when it is done."""

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gdagrow.errors import RecipeError, TrainError
from gdagrow.experiment.arms import Arm
from gdagrow.experiment.jobs import Job
from gdagrow.experiment.recipe import read_experiment
from gdagrow.experiment.runs import Experiment
from gdagrow.experiment.statistics import detectable
from gdagrow.train.dry_run import forecast
from gdagrow.units import count_text, flops_text
from gdagrow_cli.console import print_error, print_json, print_unbroken, stderr_console, stdout_console
from gdagrow_cli.plan_view import print_section
from gdagrow_cli.stopping import Stopped

QUICK = "quick"
_PACKAGES = ("accelerate", "matplotlib", "scipy", "transformers")


@dataclass(frozen=True)
class Chosen:
    """An experiment as a command line asks for it."""

    recipe: Path
    out: Path
    scale: str | None

    @property
    def command(self) -> str:
        """The command that runs it."""
        scale = ["--scale", self.scale] if self.scale else []
        return shlex.join(["gdagrow", "experiment", str(self.recipe), *scale, "--out", str(self.out)])

    def planned(self) -> Experiment:
        """The experiment, of which nothing is read yet but the recipe.

        Raises:
            GdagrowError: the recipe cannot be read, or an arm cannot be made.
        """
        _require_packages()
        return Experiment.planned(read_experiment(self.recipe, self.scale), self.out)


def experiment_at(recipe: Path, out: Path | None, scale: str | None, *, quick: bool) -> Chosen:
    """Where and at which scale an experiment is to run.

    Raises:
        RecipeError: two scales are asked for.
    """
    if quick and scale is not None:
        raise RecipeError(f"--quick is a scale and --scale {scale} another one; give one of them")
    scale = QUICK if quick else scale
    return Chosen(recipe, out or Path(f"{recipe.stem}-{scale}" if scale else recipe.stem), scale)


def show_experiment(chosen: Chosen, *, as_json: bool) -> None:
    """Print the arms and what each takes; nothing is run.

    Raises:
        GdagrowError: the recipe cannot be read, or an arm cannot be made.
    """
    experiment = chosen.planned()
    if as_json:
        print_json(_as_dict(experiment))
    else:
        _print_plan(stdout_console(), experiment)


def run_experiment(chosen: Chosen, num_workers: int | None, *, as_json: bool, quiet: bool) -> None:
    """Run what is not done yet of an experiment, and write what is known.

    Raises:
        GdagrowError: the recipe, a text or the directory cannot be used.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    from gdagrow.experiment.gather import gather
    from gdagrow.experiment.page import TABLES, write_report
    from gdagrow.experiment.results import RESULTS_FILE, write_results

    experiment, out = chosen.planned(), chosen.out
    texts = experiment.prepare_texts()
    stopped, failed, shown = None, list[str](), not as_json and not quiet
    try:
        with _shown(shown=shown) as watcher:
            failed = experiment.run(num_workers or os.cpu_count() or 1, watcher)
    except Stopped as stop:
        stopped = stop
        if shown:
            print_unbroken(stderr_console(), "stopping: tables and figures of what is done are written")
    results = gather(
        experiment, texts, name=chosen.recipe.stem, scale=chosen.scale or "default", command=chosen.command
    )
    write_results(results, out / RESULTS_FILE)
    write_report(results, out)
    if stopped is not None:
        told = f"{len(results.runs)} of {results.num_planned} runs are done and in {out}; the same command goes on"
        raise Stopped(stopped.signum, told)
    if as_json:
        print_json({"out": str(out), "runs": len(results.runs), "planned": results.num_planned, "failed": failed})
    elif not quiet:
        print_unbroken(stdout_console(), f"wrote {out / RESULTS_FILE}, {TABLES} and figures beside them")
    if failed:
        for error in failed:
            print_error(error)
        raise typer.Exit(2)


def _require_packages() -> None:
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise TrainError(f"experiments need the packages {', '.join(missing)}: pip install 'gdagrow[experiment]'")


# What would be run


def _as_dict(experiment: Experiment) -> dict[str, Any]:
    recipe = experiment.recipe
    return {
        "seeds": list(recipe.seeds),
        "planned": {"sd": recipe.planned.sd, "detectable": detectable(recipe.planned.sd, len(recipe.seeds))},
        "runs": len(experiment.arms) * len(recipe.seeds),
        "sweep_runs": len(experiment.sweep()),
        "flops": _all_flops(experiment),
        "arms": [
            {"name": arm.name, "told": arm.spec.told, "text": arm.text, "context_length": arm.recipe.context_length,
             "parameters": arm.parameters, "tokens": arm.tokens, "flops": arm.flops, "from": arm.spec.grown_from,
             "steps": arm.recipe.steps, "config": dict(arm.config)}
            for arm in experiment.arms.values()
        ],
    }  # fmt: skip


def _all_flops(experiment: Experiment) -> int:
    """Of all runs, the sweep's included; what a fork shares with its source is not run twice."""
    own = sum(arm.own_flops for arm in experiment.arms.values()) * len(experiment.recipe.seeds)
    return own + sum(forecast(job.recipe, 1).legs[-1].flops_per_step * job.steps for job in experiment.sweep())


def _print_plan(console: Console, experiment: Experiment) -> None:
    recipe = experiment.recipe
    console.print(Text(recipe.title))
    console.print(Text(recipe.question))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("arm", "heads", "parameters", "tokens", "FLOPs", "from"):
        table.add_column(heading, justify="left" if heading in ("arm", "from") else "right", no_wrap=heading != "from")
    for arm in experiment.arms.values():
        table.add_row(
            Text(arm.name), _heads(arm), count_text(arm.parameters), count_text(arm.tokens), flops_text(arm.flops),
            Text(f"{arm.spec.grown_from} at {arm.fork}" if arm.spec.grown_from else ""),
        )  # fmt: skip
    print_section(console, f"{len(experiment.arms)} arms, each with {len(recipe.seeds)} seeds", "", "", table)
    sweep = len(experiment.sweep())
    before = f"{sweep} short runs for the learning rates, then " if sweep else ""
    num_runs = len(experiment.arms) * len(recipe.seeds)
    console.print(f"{before}{num_runs} runs, {flops_text(_all_flops(experiment))} in all")
    sd, seeds = recipe.planned.sd, len(recipe.seeds)
    seen = detectable(sd, seeds)
    console.print(
        f"with {seeds} seeds and a paired deviation of {sd:g}, differences of {seen:.2g} are seen (power 80%)"
    )


def _heads(arm: Arm) -> str:
    heads = arm.sizes.heads
    noise = heads.num_query_heads - heads.num_signal_heads
    return f"{heads.num_signal_heads}+{noise}" if noise else str(heads.num_signal_heads)


# Progress


class _Quiet:
    """A watcher that shows nothing."""

    def stage(self, told: str, jobs: Sequence[Job]) -> None:
        pass

    def step(self, job: Job, step: int) -> None:
        pass

    def done(self, job: Job, loss: float | None) -> None:
        pass

    def failed(self, job: Job, error: str) -> None:
        pass


class _Lines(_Quiet):
    """A watcher that prints a line for each run that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._left = 0

    def stage(self, told: str, jobs: Sequence[Job]) -> None:
        self._left = sum(not job.is_done for job in jobs)
        if jobs:
            print_unbroken(self._console, f"{told}: {len(jobs)} runs, {len(jobs) - self._left} of them done")

    def done(self, job: Job, loss: float | None) -> None:
        self._left -= 1
        what = "diverged" if loss is None else f"held-out loss {loss:.4f}"
        print_unbroken(self._console, f"{job.told}: {what} ({self._left} left)")

    def failed(self, job: Job, error: str) -> None:
        self._left -= 1
        print_unbroken(self._console, f"{job.told} failed: {error} ({self._left} left)")


class _Bars(_Lines):
    """Bars for the whole stage, in steps, and for each run under way; a line for each that is done."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.console)
        self._progress = progress
        self._whole = progress.add_task("", total=None)
        self._tasks: dict[Path, TaskID] = {}
        self._done: dict[Path, int] = {}

    def stage(self, told: str, jobs: Sequence[Job]) -> None:
        super().stage(told, jobs)
        self._done = {job.directory: job.steps if job.is_done else 0 for job in jobs}
        self._progress.reset(
            self._whole, total=sum(job.steps for job in jobs), completed=sum(self._done.values()), description=told
        )

    def step(self, job: Job, step: int) -> None:
        if job.directory not in self._tasks:
            self._tasks[job.directory] = self._progress.add_task(f"  {job.told}", total=job.steps)
        self._done[job.directory] = step - job.fork_at
        self._progress.update(self._tasks[job.directory], completed=step - job.fork_at)
        self._progress.update(self._whole, completed=sum(self._done.values()))

    def done(self, job: Job, loss: float | None) -> None:
        self._end(job)
        super().done(job, loss)

    def failed(self, job: Job, error: str) -> None:
        self._end(job)
        super().failed(job, error)

    def _end(self, job: Job) -> None:
        if task := self._tasks.pop(job.directory, None):
            self._progress.remove_task(task)
        self._done[job.directory] = job.steps
        self._progress.update(self._whole, completed=sum(self._done.values()))


@contextmanager
def _shown(*, shown: bool) -> Iterator[_Quiet]:
    if not shown:
        yield _Quiet()
    elif not sys.stderr.isatty():
        yield _Lines(stderr_console())
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=stderr_console(), transient=True) as progress:
            yield _Bars(progress)
