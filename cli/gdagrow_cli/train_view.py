"""`gdagrow train`: its progress, and what it says when it is done."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gdagrow.errors import GdagrowError, TrainError
from gdagrow.train.metrics import HEALTH
from gdagrow.train.recipe import TrainRecipe, read_train_recipe
from gdagrow.train.run_directory import last_state
from gdagrow_cli.console import print_json, print_unbroken, stderr_console, stdout_console
from gdagrow_cli.stopping import Stopped


def run_training(
    recipe_file: Path, out: Path | None, *, resume: bool, restart: bool, as_json: bool, quiet: bool
) -> None:
    """Train as a recipe file says, and say what came of it.

    Raises:
        GdagrowError: the recipe, the model, the data or the directory cannot be used, or the loss is not finite.
    """
    if resume and restart:
        raise TrainError("--resume goes on with a run and --restart begins it anew; give one of them")
    recipe, run = read_train_recipe(recipe_file), out or Path(recipe_file.stem)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        train = _imported()
        with _shown(recipe, shown=is_first and not as_json and not quiet) as watcher:
            finished = train(recipe, run, resume=resume, restart=restart, watcher=watcher)
    except Stopped as stopped:
        raise Stopped(stopped.signum, _what_is_there(run)) from None
    except GdagrowError:
        if is_first:
            raise
        raise typer.Exit(2) from None  # the first process says it
    if not is_first or quiet:
        return
    if as_json:
        print_json({
            "run": str(run), "model": str(finished.model), "steps": finished.steps, "loss": finished.loss,
            "eval_loss": finished.eval_loss,
        })  # fmt: skip
    else:
        _print(stdout_console(), run, finished)


def _imported() -> Any:
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        import accelerate  # type: ignore[import-untyped]  # noqa: F401  (the Trainer asks for it late)

        from gdagrow.train.run import train
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "gdagrow":
            raise
        raise TrainError(f"training needs the {error.name} package: pip install 'gdagrow[train]'") from None
    return train


def _what_is_there(run: Path) -> str:
    state = last_state(run)
    return f"--resume goes on from {state.directory}" if state else "no state was saved yet"


class _Quiet:
    """A watcher that shows nothing."""

    def step(self, step: int) -> None:
        pass

    def line(self, line: Mapping[str, Any]) -> None:
        pass


class _Bar:
    """A watcher that moves a bar, and prints what is not a training loss above it."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._console = progress, progress.console
        self._task = progress.add_task("training", total=steps, figures="")

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def line(self, line: Mapping[str, Any]) -> None:
        if "loss" in line:
            figures = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(self._task, figures=figures)
            return
        for told in _in_words(line):
            print_unbroken(self._console, told)


class _Lines:
    """A watcher that prints a line for each, where there is no terminal for a bar."""

    def step(self, step: int) -> None:
        pass

    def line(self, line: Mapping[str, Any]) -> None:
        for told in _in_words(line):
            print_unbroken(stderr_console(), told)


def _in_words(line: Mapping[str, Any]) -> list[str]:
    if "eval_loss" in line:
        told = [f"held-out loss {line['eval_loss']:.4f}"]
    elif "loss" in line:
        told = [f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"]
    elif line["event"] == HEALTH:
        told = [f"warning: {warning}" for warning in line["warnings"]]
    else:
        told = [f"grown by {', '.join(f'{key} {value}' for key, value in line['expand'].items())}"]
    return [f"step {line['step']}: {each}" for each in told]


@contextmanager
def _shown(recipe: TrainRecipe, *, shown: bool) -> Iterator[Any]:
    if not shown:
        yield _Quiet()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=stderr_console(), transient=True) as progress:
            yield _Bar(progress, recipe.steps)


def _print(console: Console, run: Path, finished: Any) -> None:
    print_unbroken(console, f"wrote {finished.model}")
    losses = (("loss", finished.loss), ("held-out loss", finished.eval_loss))
    told = [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]
    print_unbroken(console, f"  {', '.join([f'{finished.steps} steps', *told])}")
