"""`gdagrow diff`: whether two checkpoints compute the same."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdagrow.verify.logits import Comparison, compare
from gdagrow.verify.parts import LARGEST_TOLERANCE, PartDifference
from gdagrow_cli.console import print_json, printable, stdout_console
from gdagrow_cli.plan_view import print_section
from gdagrow_cli.running import require_device, status
from gdagrow_cli.settings_view import print_settings


def show_diff(
    source: Path,
    grown: Path,
    tokens: Tensor,
    *,
    dtype: str,
    device: str,
    num_decoded: int,
    is_text: bool,
    as_json: bool,
) -> bool:
    """Compare what two checkpoints compute and print how it differs; returns whether they are the same function.

    Raises:
        GdagrowError: they cannot be compared.
    """
    require_device(device)
    with status("comparing", shown=not as_json) as tell:
        comparison = compare(
            source, grown, tokens, dtype=getattr(torch, dtype), device=device, num_decoded=num_decoded, progress=tell
        )
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print(stdout_console(), comparison, is_text=is_text)
    return comparison.equivalent


def _print(console: Console, comparison: Comparison, *, is_text: bool) -> None:
    within = "within" if comparison.max_rel <= comparison.tolerance else "beyond"
    verdict = ("the same function", "bold green") if comparison.equivalent else ("different", "bold red")
    console.print(Text.assemble(verdict, f": {within} what rounding alone may do"))
    for line in _remarks(comparison):
        console.print(f"  {line}")
    tokens = f"{comparison.num_sequences} x {comparison.length} tokens, computed in {comparison.dtype}"
    print_section(console, f"Logits on {tokens}", _figures_table(comparison, is_text=is_text))
    if comparison.parts:
        title = "Layers, the largest difference relative to the source's largest value"
        print_section(console, title, *_layer_tables(comparison.parts))
    print_settings(console, comparison.settings)
    if comparison.changes:
        print_section(console, "Changes", _changes_table(comparison))


def _remarks(comparison: Comparison) -> Iterator[str]:
    """What a reader should know before the figures."""
    first, logits_differ = comparison.first_difference, not comparison.max_rel <= comparison.tolerance
    if first:
        layer = "embedding" if first.layer is None else f"layer {first.layer} {_PARTS[first.part].module}"
        what = first.head or f"its {first.part}" if first.part != "embedding" else "it"
        yield f"{layer}: {what} differs by {first.max_rel:.3g}, tolerance {first.tolerance:.3g}"
        if not logits_differ:
            yield "the logits agree all the same: features or heads may stand in another order than the lineage says"
    elif comparison.parts and logits_differ:
        yield "every part of every layer agrees: what differs is the last norm or the head"
    if comparison.parts_not_compared:
        yield f"compared by logits alone, not layer by layer: {printable(comparison.parts_not_compared)}"
    if comparison.tolerance > LARGEST_TOLERANCE:
        yield f"rounding in {comparison.dtype} alone may change these logits by {comparison.tolerance:.0%}: this shows"
        yield "little; compare in float64"
    decoding = comparison.decoding
    if decoding and not decoding.same:
        yield (f"greedy decoding parts at token {len(decoding.source)}: {decoding.source[-1]} by the source, "
               f"{decoding.grown[-1]} by the grown model")  # fmt: skip


def _figures_table(comparison: Comparison, *, is_text: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_row("largest difference", f"{comparison.max_abs:.3g}")
    table.add_row("relative to the largest logit", f"{comparison.max_rel:.3g}")
    table.add_row("tolerance for that", f"{comparison.tolerance:.3g}")
    terms = f"8 x {comparison.condition:.3g} measured x sums of {comparison.longest_sum:,} terms"
    table.add_row("  made of", terms + " and cast weights" * comparison.rounds_weights)
    table.add_row("KL divergence, nats a token", f"{comparison.kl:.3g}")
    table.add_row("same most likely token", f"{comparison.top1_agreement:.2%}")
    if is_text and comparison.source_loss is not None and comparison.grown_loss is not None:
        both = (f"{_perplexity(loss):.6g}" for loss in (comparison.source_loss, comparison.grown_loss))
        table.add_row("perplexity a token, source and grown", "  ".join(both))
    if comparison.decoding and comparison.decoding.same:
        told = f"the same {len(comparison.decoding.source)} tokens after {comparison.decoding.prompt_length}"
        table.add_row("greedy decoding through the cache", told)
    return table


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class _Part:
    """How a part is told: its column, and the module that it belongs to."""

    heading: str
    module: str


_PARTS: Final[Mapping[str, _Part]] = {
    "signal heads": _Part("signal", "self_attn"),
    "noise heads": _Part("noise", "self_attn"),
    "differences": _Part("differences", "self_attn"),
    "attention": _Part("attention", "self_attn"),
    "mlp": _Part("mlp", "mlp"),
    "residual": _Part("residual", "residual"),
}
_MAX_LAYERS: Final = 12


def _layer_tables(parts: Sequence[PartDifference]) -> Iterator[Table | Text]:
    """The parts of each layer; of many layers those that come closest to their tolerance."""
    layers: dict[int, list[PartDifference]] = {}
    for part in parts:
        if part.layer is not None:
            layers.setdefault(part.layer, []).append(part)
    closest = sorted(layers, key=lambda layer: max(map(_closeness, layers[layer])), reverse=True)[:_MAX_LAYERS]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("layer", *(part.heading for part in _PARTS.values())):
        table.add_column(heading, justify="right")
    for layer in sorted(closest):
        cells = {part.part: Text(f"{part.max_rel:.1e}{'' if part.agrees else ' !'}", "" if part.agrees else "bold red")
                 for part in layers[layer]}  # fmt: skip
        # The source has no heads for those of a new block, of which only what it adds is compared: nothing.
        name = str(layer) if "signal heads" in cells else f"{layer} new"
        table.add_row(name, *(cells.get(part, "") for part in _PARTS))
    yield table
    judged = [part for layer in layers.values() for part in layer]
    if bad := sum(not part.agrees for part in judged):
        yield Text(f"! beyond its tolerance: {bad} of {len(judged)} parts")
    else:
        worst = max(judged, key=_closeness)
        yield Text(f"each within its own tolerance; the closest comes to {_closeness(worst):.0%} of it")
    if left := len(layers) - len(closest):
        yield Text(f"... and {left} layers further from theirs; --json lists all")


def _closeness(part: PartDifference) -> float:
    """How much of its tolerance a part uses."""
    if not math.isfinite(part.max_rel):
        return math.inf
    return part.max_rel / part.tolerance if part.tolerance else part.max_rel


def _changes_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("source", justify="right")
    table.add_column("grown", justify="right")
    for change in comparison.changes:
        table.add_row(change.what, change.source, change.grown)
    return table
