"""`gdagrow diff --gradients`: whether a grown checkpoint learns as its source, and whose moments can be carried."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdagrow.verify.gradients import GradientComparison, GradientDifference, compare_gradients
from gdagrow_cli.console import print_json, stdout_console
from gdagrow_cli.plan_view import print_section
from gdagrow_cli.running import require_device, status


def show_gradients(source: Path, grown: Path, tokens: Tensor, *, dtype: str, device: str, as_json: bool) -> bool:
    """Compare gradients and print how they differ; returns whether the chain rule holds for every tensor.

    Raises:
        GdagrowError: they cannot be compared.
    """
    require_device(device)
    with status("comparing", shown=not as_json) as tell:
        comparison = compare_gradients(source, grown, tokens, dtype=getattr(torch, dtype), device=device, progress=tell)
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print(stdout_console(), comparison)
    return comparison.equivalent


def _print(console: Console, comparison: GradientComparison) -> None:
    rows = _worst_of_each(comparison)
    if comparison.equivalent:
        verdict = Text.assemble(("the same gradients", "bold green"), ": those of all copies make up the source's")
    else:
        verdict = Text.assemble(("different", "bold red"), ": beyond what rounding alone may do")
    console.print(verdict)
    carried = sum(tensor.lost is None for tensor in comparison.tensors)
    console.print(f"  optimizer moments can be carried exactly for {carried} of {len(comparison.tensors)} tensors")
    if wrong := [tensor for tensor in comparison.tensors if not tensor.agrees]:
        first = f"{wrong[0].name} by {wrong[0].chain:.3g}, tolerance {wrong[0].tolerance:.3g}"
        console.print(f"  {len(wrong)} tensors differ, the first of the backward pass: {first}")
    tokens = f"{comparison.num_sequences} x {comparison.length} tokens, computed in {comparison.dtype}"
    title = f"Gradients on {tokens}, loss {comparison.loss:.4g}, maps from {comparison.maps}"
    print_section(console, title, _table(rows))
    for reason in dict.fromkeys(row.lost for row in rows if row.lost):
        names = ", ".join(_short(row) for row in rows if row.lost == reason)
        print_section(console, f"Moments that cannot be carried exactly: {reason}", Text(names))


def _worst_of_each(comparison: GradientComparison) -> list[GradientDifference]:
    """For each row of the architecture's table, the tensor that is furthest from the mirror rule."""
    worst: dict[str, GradientDifference] = {}
    for tensor in comparison.tensors:
        known = worst.get(tensor.parameter)
        if known is None or not tensor.mirror <= known.mirror:
            worst[tensor.parameter] = tensor
    return list(worst.values())


def _short(tensor: GradientDifference) -> str:
    return tensor.parameter.rpartition("{layer}.")[2].removeprefix("model.")


def _table(rows: list[GradientDifference]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("over all layers")
    for heading in ("together", "each copy", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("moments")
    for row in rows:
        moments = Text("exact", "green") if row.lost is None else Text(f"{row.mirror:.1%} off", "yellow")
        cells = (f"{row.chain:.1e}{'' if row.agrees else ' !'}", f"{row.mirror:.1e}", f"{row.tolerance:.1e}")
        table.add_row(_short(row), *cells, moments)
    return table
