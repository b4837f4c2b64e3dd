"""`gdagrow inspect`: what a checkpoint is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdagrow.archs import architecture_of
from gdagrow.axes import size_of
from gdagrow.checkpoint import read_checkpoint
from gdagrow.coordinates import coordinates
from gdagrow.costs import ModelFigures, checkpoint_figures
from gdagrow.header import Header
from gdagrow.record import growths_of
from gdagrow_cli.console import print_json, print_unbroken, stdout_console
from gdagrow_cli.figures_view import HEADING, figures_table
from gdagrow_cli.head_map import draw_heads, legend


def show_checkpoint(checkpoint: Path, *, as_json: bool) -> None:
    """Print what a checkpoint is.

    Raises:
        CheckpointError: it cannot be read, or no table covers it.
    """
    header = read_checkpoint(checkpoint)
    name = architecture_of(header.config).name
    figures, growths = checkpoint_figures(header), growths_of(checkpoint)
    if as_json:
        print_json({"directory": str(checkpoint), "architecture": name, **figures.as_dict(), "grown": growths})
    else:
        _print(header, name, figures, growths)


def _print(header: Header, name: str, figures: ModelFigures, growths: list[dict[str, Any]]) -> None:
    console, sizes = stdout_console(), figures.sizes
    kind = "grouped differential attention" if sizes.heads.ratio > 1 else "differential attention"
    print_unbroken(console, str(header.directory))
    console.print(f"{name}: {kind}, {sizes.num_layers} layers, {'tied' if figures.tied else 'untied'} embeddings")
    for growth in growths:
        print_unbroken(console, _growth_sentence(growth))
    console.print()
    console.print("Heads of every layer", style=HEADING)
    console.print(draw_heads(sizes.heads, _query_heads(header), console.width))
    console.print(legend())
    console.print()
    console.print(figures_table({"": figures}))


def _query_heads(header: Header) -> dict[int, list[int]]:
    """The numbers of each group's query heads, in the order in which the checkpoint stores them all."""
    architecture = architecture_of(header.config)
    rows = (row.parsed for row in architecture.table(header.config))
    (queries, *_) = (row.dims[0] for row in rows if {"group", "signal"} <= row.axes(read=False))
    one_row_a_head = {**architecture.sizes(header.config).axes, "head_dim": 1}
    groups: dict[int, list[int]] = {}
    for head in range(size_of(queries, one_row_a_head)):
        groups.setdefault(dict(coordinates(queries, one_row_a_head, head))["group"], []).append(head)
    return groups


def _growth_sentence(growth: Mapping[str, Any]) -> str:
    done = [f"{growth['converted_from']} to {growth['architecture']}"] if growth["converted_from"] else []
    done += [f"{axis} {_times(value)}" for axis, value in growth["factors"].items() if value != 1]
    if growth["new_layers"]:
        done.append(f"new layers {', '.join(map(str, growth['new_layers']))}")
    done += [f"{key} {value}" for key, value in growth["settings"].items()]
    done += ["untied"] * growth["untied"]
    noise = growth["noise"]
    copies = "; exact copies" if growth["recipe"].get("exact_copies") else ""
    if noise is not None:
        copies = f"; noise {noise['snr_db']:g} dB down, seed {noise['seed']}"
    return f"grown from {growth['source']}: {', '.join(done)}{copies} (gdagrow {growth['gdagrow']})"


def _times(value: Any) -> str:
    return f"to {value}" if isinstance(value, str) else f"x{value}"
