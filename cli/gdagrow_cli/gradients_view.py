"""`gdagrow diff --gradients`: whether a grown checkpoint learns as its source, and whose moments can be carried."""

from math import isnan
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdagrow.verify.gradients import GradientComparison, compare_gradients
from gdagrow.verify.mirror import GradientDifference
from gdagrow.views.deeper import NEW_BLOCK
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
    if comparison.equivalent:
        verdict = Text.assemble(("the same gradients", "bold green"), ": those of all copies make up the source's")
    else:
        verdict = Text.assemble(("different", "bold red"), ": beyond what rounding alone may do")
    console.print(verdict)
    old = [tensor for tensor in comparison.tensors if tensor.lost != NEW_BLOCK]
    told = f"{sum(tensor.lost is None for tensor in old)} of {len(old)} tensors"
    new = len(comparison.tensors) - len(old)
    more = f"; {new} more are of new blocks" if new else ""
    console.print(f"  optimizer moments can be carried exactly for {told}{more}")
    if wrong := [tensor for tensor in comparison.tensors if not tensor.agrees]:
        first = f"{wrong[0].name} by {wrong[0].chain:.3g}, tolerance {wrong[0].tolerance:.3g}"
        console.print(f"  {len(wrong)} tensors differ, the first of the backward pass: {first}")
    tokens = f"{comparison.num_sequences} x {comparison.length} tokens, computed in {comparison.dtype}"
    title = f"Gradients on {tokens}, loss {comparison.loss:.4g}, maps from {comparison.maps}"
    print_section(console, title, _table(old))
    for reason in dict.fromkeys(tensor.lost for tensor in old if tensor.lost):
        names = dict.fromkeys(_short(tensor) for tensor in old if tensor.lost == reason)
        print_section(console, f"Moments that cannot be carried exactly: {reason}", Text(", ".join(names)))


def _short(tensor: GradientDifference) -> str:
    return tensor.parameter.rpartition("{layer}.")[2].removeprefix("model.")


def _table(tensors: list[GradientDifference]) -> Table:
    """For each row of the architecture's table, the tensor that is furthest from the mirror rule."""
    rows: dict[str, list[GradientDifference]] = {}
    for tensor in tensors:
        rows.setdefault(tensor.parameter, []).append(tensor)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("over all layers")
    for heading in ("together", "each copy", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("moments")
    for of_row in rows.values():
        # Max finds what is no number, too.
        row = max(of_row, key=lambda tensor: (isnan(tensor.mirror), tensor.mirror))
        cells = (f"{row.chain:.1e}{'' if row.agrees else ' !'}", f"{row.mirror:.1e}", f"{row.tolerance:.1e}")
        table.add_row(_short(row), *cells, _moments(row, of_row))
    return table


def _moments(worst: GradientDifference, of_row: list[GradientDifference]) -> Text:
    exact = sum(tensor.lost is None for tensor in of_row)
    if exact == len(of_row):
        return Text("exact", "green")
    # What is made anew has no gradient to be held against, and so no distance from it.
    if worst.lost and worst.mirror:
        return Text(f"{worst.mirror:.1%} off", "yellow")
    return Text(f"exact in {exact} of {len(of_row)}" if exact else "anew", "yellow")
