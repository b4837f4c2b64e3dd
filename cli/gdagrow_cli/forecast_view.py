"""`gdagrow train --dry-run`: what a run would be and take."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gdagrow.train.dry_run import Forecast, Leg, forecast
from gdagrow.train.recipe import read_train_recipe
from gdagrow.units import bytes_text, count_text, flops_text
from gdagrow_cli.console import print_json, stdout_console
from gdagrow_cli.plan_view import print_section

_MEMORY = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "total")
_ESTIMATES = ("activations", "logits", "total")


def show_forecast(recipe_file: Path, processes: int | None, *, as_json: bool) -> None:
    """Print the sizes, the memory of one process, and the work of a step, of every part of a run.

    Raises:
        GdagrowError: the recipe or the model cannot be read, cannot grow so, or the batch does not divide.
    """
    recipe = read_train_recipe(recipe_file)
    found = forecast(recipe, processes or int(os.environ.get("WORLD_SIZE", "1")))
    if as_json:
        print_json(found.as_dict())
    else:
        _print(stdout_console(), found)


def _print(console: Console, found: Forecast) -> None:
    steps = found.legs[-1].end
    console.print(f"{steps:,} steps of {found.tokens_per_step:,} tokens, {count_text(found.tokens)} tokens in all")
    processes = "1 process" if found.processes == 1 else f"{found.processes:,} processes, each"
    at_once = "1 sequence" if found.micro_batch_size == 1 else f"{found.micro_batch_size:,} sequences"
    often = "once" if found.accumulation == 1 else f"{found.accumulation:,} times"
    console.print(f"  {processes} with {at_once} at once, {often} a step")
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("")
    for leg in found.legs:
        table.add_column(f"steps {leg.begin + 1:,} to {leg.end:,}", justify="right")
    for name, values in _rows(found.legs):
        table.add_row(Text(name), *values)
    console.print()
    console.print(table)
    print_section(console, "Not run: sizes by arithmetic; activations and logits are estimates")


def _rows(legs: tuple[Leg, ...]) -> list[tuple[str, list[str]]]:
    rows = [
        ("parameters", [count_text(leg.model.num_parameters) for leg in legs]),
        ("ratio", [leg.model.sizes.heads.told_ratio for leg in legs]),
        ("work of a step", [flops_text(leg.flops_per_step) for leg in legs]),
        ("memory of a process", ["" for _ in legs]),
    ]
    for kind in _MEMORY:
        values = [getattr(leg.memory, kind) for leg in legs]
        about = "about " if kind in _ESTIMATES else ""
        rows.append((f"  {kind}", [f"{about}{bytes_text(value)}" if value else "-" for value in values]))
    return rows
