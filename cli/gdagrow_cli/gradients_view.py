"""`gdagrow diff --gradients`: whether a grown checkpoint learns as its source, and whose moments can be carried."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdagrow.verify.gradients import GradientComparison, compare_gradients
from gdagrow.verify.mirror import UNEQUAL_PARTS, GradientDifference
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
    lost = [tensor for tensor in comparison.tensors if tensor.lost]
    in_all = Counter(tensor.parameter for tensor in comparison.tensors)
    not_carried = Counter(tensor.parameter for tensor in lost)
    print_section(console, title, _table(rows, {name: in_all[name] - not_carried[name] for name in in_all}, in_all))
    for reason in dict.fromkeys(tensor.lost for tensor in lost):
        names = ", ".join(dict.fromkeys(_short(tensor) for tensor in lost if tensor.lost == reason))
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


def _table(rows: list[GradientDifference], carried: Mapping[str, int], in_all: Mapping[str, int]) -> Table:
    """`carried` and `in_all`: of each row of the architecture's table, how many tensors' moments are, and there are."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("over all layers")
    for heading in ("together", "each copy", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("moments")
    for row in rows:
        moments = _moments(row, carried[row.parameter], in_all[row.parameter])
        cells = (f"{row.chain:.1e}{'' if row.agrees else ' !'}", f"{row.mirror:.1e}", f"{row.tolerance:.1e}")
        table.add_row(_short(row), *cells, moments)
    return table


def _moments(worst: GradientDifference, carried: int, in_all: int) -> Text:
    if carried == in_all:
        return Text("exact", "green")
    if worst.lost == UNEQUAL_PARTS or worst.mirror > worst.tolerance:
        return Text(f"{worst.mirror:.1%} off", "yellow")
    return Text(f"in {carried} of {in_all}" if carried else "none", "yellow")
