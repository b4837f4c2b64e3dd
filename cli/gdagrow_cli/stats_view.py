"""`gdagrow stats`: a model's attention maps, and how like each other its copies still are."""

from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.checkpoint import read_checkpoint
from gdagrow.errors import CompareError
from gdagrow.record import RECORD_FILE
from gdagrow.verify.attention import AttentionStats, LayerStats, MapStats, attention_stats, measured_queries
from gdagrow.verify.clones import Clones, CloneSimilarity, clone_similarity
from gdagrow_cli.console import print_json, print_unbroken, stdout_console
from gdagrow_cli.figures_view import HEADING
from gdagrow_cli.plan_view import print_section
from gdagrow_cli.running import require_device, status


def show_stats(
    checkpoint: Path,
    tokens: Tensor,
    *,
    dtype: str,
    device: str,
    lineage: Path | None,
    layer: int | None,
    is_text: bool,
    as_json: bool,
) -> None:
    """Measure a checkpoint and print what was found: a line a layer, or every head of one layer.

    Raises:
        GdagrowError: it cannot be measured.
    """
    require_device(device)
    _require_layer(checkpoint, layer, as_json=as_json)
    with status("measuring", shown=not as_json) as tell:
        # First, because a wrong lineage shows at once.
        clones = clone_similarity(checkpoint, lineage=lineage, progress=tell)
        attention = attention_stats(checkpoint, tokens, dtype=getattr(torch, dtype), device=device, progress=tell)
    if as_json:
        print_json({"attention": attention.as_dict(), "clones": clones.as_dict() if clones else None})
        return
    console = stdout_console()
    print_unbroken(console, str(checkpoint))
    _print_attention(console, attention, layer, is_text=is_text)
    _print_clones(console, clones, layer)


def _require_layer(checkpoint: Path, layer: int | None, *, as_json: bool) -> None:
    if layer is None:
        return
    if as_json:
        raise CompareError("--json has every head of every layer already, so --layer would do nothing; leave it out")
    config = read_checkpoint(checkpoint).config
    num_layers = architecture_of(config).sizes(config).num_layers
    if layer >= num_layers:
        raise CompareError(f"--layer {layer}: {checkpoint} has the layers 0 to {num_layers - 1}; choose one of them")


def _print_attention(console: Console, stats: AttentionStats, layer: int | None, *, is_text: bool) -> None:
    kind = "tokens of the text" if is_text else "random tokens"
    what = "Attention" if layer is None else f"Attention of layer {layer}"
    title = f"{what} on {stats.num_sequences} x {stats.length} {kind}, computed in {stats.dtype}"
    whose = "means over heads; --layer N shows each of them" if layer is None else _lambdas(stats.layers[layer])
    table = _layers_table(stats) if layer is None else _heads_table(stats, stats.layers[layer])
    print_section(console, title, whose, f"spread evenly: {_even(stats.length)}", "", table)


def _lambdas(layer: LayerStats) -> str:
    return f"lambda {layer.lambda_:.3f}, lambda_init {layer.lambda_init:.3f}"


def _even(length: int) -> str:
    """What maps would have that weigh all visible positions alike."""
    visible = [query + 1 for query in measured_queries(length)]
    tops = (fmean(-(-v * percent // 100) / v for v in visible) for percent in (1, 5))
    first, second = (f"{top:.1%}" for top in tops)
    return f"entropy {fmean(map(log, visible)):.2f} nats, {first} on the top 1%, {second} on the top 5%"


def _table(*headings: str) -> Table:
    """Headings have two lines, of which the first names a group of columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _layers_table(stats: AttentionStats) -> Table:
    table = _table(
        "\nlayer", "\nlambda", "\ninit", "entropy\nsignal", "\nnoise", "\ndiff.",
        "top 5%\nsignal", "\nnoise", "\ndiff.", "diff.\nnegative",
    )  # fmt: skip
    table.columns[0].justify = "right"
    for layer in stats.layers:
        maps = (layer.signal, layer.noise, layer.difference)
        table.add_row(
            str(layer.layer), f"{layer.lambda_:.3f}", f"{layer.lambda_init:.3f}",
            *(f"{fmean(m.entropy):.2f}" for m in maps), *(f"{fmean(m.top_5_percent):.1%}" for m in maps),
            f"{fmean(layer.difference.negative or ()):.1%}",
        )  # fmt: skip
    return table


def _heads_table(stats: AttentionStats, layer: LayerStats) -> Table:
    table = _table("", "entropy\nmap", "\ndiff.", "top 1%\nmap", "\ndiff.", "top 5%\nmap", "\ndiff.", "diff.\nnegative")
    for group in range(stats.num_groups):
        table.add_row(f"group {group}", style=HEADING)
        for head in range(group * stats.ratio, (group + 1) * stats.ratio):
            table.add_row(f"  signal head {head % stats.ratio}", *_cells(layer.signal, layer.difference, head))
        table.add_row("  noise head", *_cells(layer.noise, None, group))
    return table


def _cells(maps: MapStats, difference: MapStats | None, head: int) -> Iterator[str]:
    """A head's figures; a noise head has no difference of its own."""
    for of in (maps, difference):
        yield f"{of.entropy[head]:.2f}" if of else ""
    for name in ("top_1_percent", "top_5_percent"):
        for of in (maps, difference):
            yield f"{getattr(of, name)[head]:.1%}" if of else ""
    yield f"{difference.negative[head]:.1%}" if difference and difference.negative else ""


def _print_clones(console: Console, clones: Clones | None, layer: int | None) -> None:
    title = "Clone similarity" if layer is None else f"Clone similarity of the heads of layer {layer}"
    if clones is None:
        told = f"no {RECORD_FILE}: nothing says that this model was grown; --lineage PATH names the file if it was"
        print_section(console, title, told)
        return
    tensors = [t for t in clones.tensors if layer is None or (t.layer == layer and t.heads)]
    if tensors:
        table = _clones_table(tensors) if layer is None else _clone_heads_table(tensors)
        print_section(console, title, *_verdict(tensors), "", table)
    else:
        print_section(console, title, "the growth copied nothing" if layer is None else "the growth copied no head")
    console.print()
    print_unbroken(console, "  lineage: ", clones.lineage)


def _verdict(tensors: Sequence[CloneSimilarity]) -> Iterator[Text]:
    """Whether copies have parted, in plain words."""
    copies, parts = [t for t in tensors if t.written], [t for t in tensors if not t.written]
    equal = sum(t.relative_distance == 0 for t in copies)
    if equal == len(copies):
        yield Text.assemble(("copies have not parted", "bold yellow"), ": equal in all that the layers write")
    else:
        yield Text.assemble(("copies have parted", "bold green"), f": {_on_average(copies)}")
        if equal:
            yield Text(f"still equal: {equal} of {len(copies)} places, each a tensor along one axis")
    if parts and not any(t.relative_distance for t in parts):
        yield Text("nor have the parts of split weights: such copies stay equal in training")
    elif parts:
        yield Text(f"the parts of split weights: {_on_average(parts)}")


def _on_average(tensors: Sequence[CloneSimilarity]) -> str:
    cosine, distance = _mean(tensors)
    return f"distance {distance:.2%}, cosine {cosine:.6f} on average"


def _mean(tensors: Sequence[CloneSimilarity]) -> tuple[float, float]:
    return fmean(t.cosine for t in tensors), fmean(t.relative_distance for t in tensors)


def _clones_table(tensors: Sequence[CloneSimilarity]) -> Table:
    """One line for each parameter and axis, over all layers; those of a layer stand under their common prefix."""
    table = _table("", "\naxis", "\nkind", "cosine\nmean", "\nleast", "distance\nmean")
    rows: dict[tuple[str, str, bool], list[CloneSimilarity]] = {}
    for tensor in tensors:
        rows.setdefault((tensor.parameter, tensor.axis, tensor.written), []).append(tensor)
    above = ""
    for (parameter, axis, written), found in rows.items():
        prefix, layered, _ = parameter.partition("{layer}.")
        if layered and not above.startswith(prefix + layered):
            table.add_row(f"{prefix}*")
        label = "" if parameter == above else "  " * bool(layered) + _short(parameter)
        (cosine, distance), least = _mean(found), min(t.cosine for tensor in found for t in tensor.heads or (tensor,))
        table.add_row(label, axis, _kind(written), _cosine(cosine), _cosine(least), _distance(distance))
        above = parameter
    return table


def _clone_heads_table(tensors: Sequence[CloneSimilarity]) -> Table:
    table = _table("head of the source", "cosine", "distance")
    for tensor in tensors:
        table.add_row(f"{_short(tensor.parameter)}, {_kind(tensor.written)}", style=HEADING)
        for head in tensor.heads:
            table.add_row(f"  {head.head}", _cosine(head.cosine), _distance(head.relative_distance))
    return table


def _short(parameter: str) -> str:
    """A parameter's name without what all those of a layer share, and without `.weight`."""
    return parameter.rpartition("{layer}.")[2].removesuffix(".weight")


def _kind(written: bool) -> str:
    return "copies" if written else "parts"


def _cosine(cosine: float) -> str:
    return "1" if cosine == 1 else f"{cosine:.6f}"


def _distance(distance: float) -> str:
    return f"{distance:.2%}" if distance else "0"
