"""What the page says of a growth: what was done, which head came of which, and the sizes before and after."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from gdagrow.costs import PARTS
from gdagrow.report.charts import Bar, bars
from gdagrow.report.head_maps import MAX_GROUPS, MAX_OLD_GROUPS, head_map, left_out, lineage_map
from gdagrow.report.markup import (
    Format,
    escaped,
    figure,
    figure_text,
    legend,
    missing,
    paragraph,
    ratio,
    section,
    table,
)
from gdagrow.report.markup import whole as whole_number
from gdagrow.report.node import Node
from gdagrow.report.panel import colour
from gdagrow.units import bytes_text, count_text, flops_text, times_text

# Sizes and costs: label, path in a model's figures, how it is written.
_SIZES: Final[tuple[tuple[str, str, Format], ...]] = (
    ("ratio", "heads.ratio", ratio),
    ("signal heads", "heads.num_signal_heads", whole_number),
    ("noise heads, one a query group", "heads.num_groups", whole_number),
    ("KV groups", "heads.num_kv_groups", whole_number),
    ("head_dim", "sizes.head_dim", whole_number),
    ("hidden", "sizes.hidden", whole_number),
    ("FFN", "sizes.ffn", whole_number),
    ("layers", "sizes.num_layers", whole_number),
    ("vocabulary", "sizes.vocab", whole_number),
    ("parameters", "num_parameters", count_text),
    ("bytes of weights", "weight_bytes", bytes_text),
    ("KV cache per token", "kv_cache_bytes_per_token", bytes_text),
    ("forward per token, weights", "matmul_flops_per_token", flops_text),
    ("forward per token, attention", "attention_flops_per_token", flops_text),
    ("looking back on, tokens", "context_length", whole_number),
)


def what_was_done(growths: Node) -> str:
    """The growths that made a model, oldest first, as `growth.json` tells them."""
    items = [f"<li>{''.join(_done(growth))}</li>" for growth in growths]
    if not items:
        return paragraph("It has no <code>growth.json</code> that would say what was done.")
    return f'<ol class="growths">{"".join(items)}</ol>' if len(items) > 1 else paragraph(*_done(growths[0]))


def _done(growth: Node) -> Iterator[str]:
    converted = growth["converted_from"].value
    done = [f"{escaped(converted)} to {escaped(growth['architecture'].value)}"] if converted else []
    done += [f"{escaped(axis)} {_times(value)}" for axis, value in growth["factors"].value.items() if value != 1]
    if new := growth["new_layers"].value:
        done.append(f"of which {escaped(', '.join(map(str, new)))} {'is' if len(new) == 1 else 'are'} new")
    done += [f"{escaped(key)} {escaped(str(value))}" for key, value in growth["settings"].value.items()]
    done += ["embeddings untied"] * growth["untied"].value
    yield f"Grown from <b>{escaped(growth['source'].value)}</b>: {', '.join(done)}"
    if noise := growth["noise"]:
        down, seed = figure_text(noise["snr_db"], "{:g}".format), figure_text(noise["seed"], str)
        yield f"; copies parted by zero-sum noise {down} dB below the weights, seed {seed}"
    elif growth["recipe"].value.get("exact_copies"):
        yield "; exact copies"
    recipe = ", ".join(f"{key}: {value}" for key, value in growth["recipe"].value.items())
    version = escaped(growth["gdagrow"].value)
    yield f' <span class="aside">(recipe <code>{escaped(recipe)}</code>, gdagrow {version})</span>.'


def _times(value: Any) -> str:
    return f"to {escaped(value)}" if isinstance(value, str) else f"&times;{escaped(value)}"


def heads_figure(model: Node) -> str:
    """The heads of one model."""
    heads = model["figures"]["heads"]
    groups, signal, kv = (heads[key].value for key in ("num_groups", "ratio", "num_kv_groups"))
    more = f" {groups - MAX_GROUPS} more groups are alike." if groups > MAX_GROUPS else ""
    told = (
        "One row is a query group: its signal heads (S), and the noise head (N) whose map is subtracted from each of "
        f"theirs. KV is the group of keys and values that serves it. All layers are alike.{more}"
    )
    label = f"Head map: {groups} query groups of {signal} signal heads and a noise head"
    return figure("", told, [head_map(groups, signal, kv, label=label)])


def lineage_section(identity: str, grown: Node, source: Node) -> str:
    """The heads before and after, and which was cloned from which."""
    heading = "Heads and their lineage"
    if not grown["lineage"]:
        reason = missing("no lineage", grown["problems"]["lineage"].value)
        return section(identity, heading, reason, heads_figure(source), heads_figure(grown["model"]))
    heads, lineage = source["figures"]["heads"], grown["lineage"]
    groups = min(heads["num_groups"].value, MAX_OLD_GROUPS)
    panels = [lineage_map(lineage, group, heads["ratio"].value) for group in range(groups)]
    more = left_out(lineage, heads["num_groups"].value)
    others = ", ".join(map(str, lineage["other_layers"].value))
    layers = (
        f"this is layer 0, and layers {others} have copies of other signal heads" if others else "every layer is alike"
    )
    told = (
        f"One query group of the source on the left, what grew out of it on the right; {layers}. S is a "
        "signal head, N the noise head that is subtracted from its whole group. A line leads from each head to its "
        "copies, in its colour and under its name; further copies are paler."
    )
    return section(identity, heading, figure("", f"{told} Not drawn: {more}." if more else told, panels))


def sizes_section(identity: str, models: Sequence[tuple[str, Node]]) -> str:
    """A table of sizes and costs beside the parameters by part, of one model or two."""
    figures = [(called, model["figures"]) for called, model in models]
    two = len(figures) > 1
    rows = [_size_row(label, [node.at(path) for _, node in figures], text) for label, path, text in _SIZES]
    head = ("", *(escaped(called) for called, _ in figures), *([""] if two else []))
    groups = [(part, found) for part in PARTS if (found := _bars(part, figures))]
    keys = legend([("source", "box", figures[0][0]), ("grown", "box", figures[-1][0])]) if two else ""
    told = "Parameters by what they belong to. A tied head is the embedding's own tensor and is counted there."
    drawn = figure("Parameters by part", told, [bars(groups, label="Bars: parameters by part")], before=keys)
    content = f'<div class="beside">{table(head, rows, kind="sizes")}{drawn}</div>'
    return section(identity, "Sizes, before and after" if two else "Sizes", content)


def _size_row(label: str, nodes: Sequence[Node], text: Format) -> Sequence[str]:
    cells = [figure_text(node, text) for node in nodes]
    if len(nodes) > 1:
        more = times_text(nodes[0].value, nodes[-1].value) if nodes[0].value else "new"
        cells.append(f'<span class="times">{more}</span>')
    return (label, *cells)


def _bars(part: str, figures: Sequence[tuple[str, Node]]) -> list[Bar]:
    found = []
    for (called, node), role in zip(figures, ("source", "grown"), strict=False):
        if part in node["parameters"].value:
            count = node["parameters"][part]
            found.append(Bar(f"{part} parameters, {called}", count, count_text(count.value), colour(role)))
    return found
