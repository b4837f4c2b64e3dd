"""The page: a report as one HTML file that needs nothing but itself, made from the JSON alone."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from gdagrow.report.charts import Line, curves
from gdagrow.report.evidence_sections import certificate_section, comparison_section, verdicts
from gdagrow.report.growth_sections import heads_figure, lineage_section, sizes_section, what_was_done
from gdagrow.report.markup import escaped, figure, figure_text, legend, paragraph, ratio, section, table, whole
from gdagrow.report.model_sections import attention_sections, clone_section
from gdagrow.report.node import Node
from gdagrow.report.panel import NUM_SERIES, series
from gdagrow.units import bytes_text, count_text

DATA_ID: Final = "gdagrow-report"
# Nothing is fetched and nothing runs, whatever a checkpoint's name or config may say.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_OVERVIEW: Final = (
    ("ratio", "heads.ratio", ratio), ("signal heads", "heads.num_signal_heads", whole),
    ("noise heads", "heads.num_groups", whole), ("KV groups", "heads.num_kv_groups", whole),
    ("hidden", "sizes.hidden", whole), ("FFN", "sizes.ffn", whole), ("parameters", "num_parameters", count_text),
    ("weights", "weight_bytes", bytes_text),
)  # fmt: skip


def page_of(report: Mapping[str, Any]) -> str:
    """Make the page of a report.

    Args:
        report: What `Report.as_dict` gives; every figure on the page is read from it and says from where.

    Returns:
        HTML, the same for the same report.
    """
    top = Node(report)
    source, grown = top["source"], list(top["grown"])
    name = source["name"].value
    sections = [
        ("source", "Source", _source(source)),
        *((f"grown-{i}", f"Grown: {node['model']['name'].value}", _grown(f"grown-{i}", source, node))
          for i, node in enumerate(grown, 1)),
        *([("training", "Training", _training(list(top["runs"])))] if len(top["runs"]) else []),
        ("made", "How this was made", _made(top)),
    ]  # fmt: skip
    links = "".join(f'<li><a href="#{identity}">{escaped(heading)}</a></li>' for identity, heading, _ in sections)
    body = "".join(section(identity, escaped(heading), content, level=2) for identity, heading, content in sections)
    style = files("gdagrow.report").joinpath("page.css").read_text(encoding="utf-8")
    data = json.dumps(report).replace("<", "\\u003c")
    return _numbered(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(name)} &ndash; gdagrow report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>{_opening(source, grown)}{_overview(source, grown)}<nav><ul>{links}</ul></nav></header>\n"
        f'<main>{body}</main>\n<script type="application/json" id="{DATA_ID}">{data}</script>\n</body>\n</html>\n'
    )


def _numbered(page: str) -> str:
    """Make the ids of each drawing its own."""
    numbers = iter(range(len(page)))

    def renamed(drawing: re.Match[str]) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>d{next(numbers)}-", drawing[0])

    return re.sub(r"<svg .*?</svg>", renamed, page, flags=re.DOTALL)


def _opening(source: Node, grown: Sequence[Node]) -> str:
    heads, figures = source["figures"]["heads"], source["figures"]
    kind = "grouped differential attention" if heads["ratio"].value > 1 else "differential attention"
    more = {0: "", 1: ", and what it was grown into"}.get(len(grown), f", and {len(grown)} models grown from it")
    return (
        f'<p class="eyebrow">gdagrow report</p><h1>{escaped(source["name"].value)}</h1>'
        f'<p class="lede">A {escaped(source["architecture"].value)} model with {kind}, '
        f"{figure_text(figures['num_parameters'], count_text)} parameters in "
        f"{figure_text(figures.at('sizes.num_layers'), whole)} layers{more}.</p>"
    )


def _overview(source: Node, grown: Sequence[Node]) -> str:
    if not grown:
        return ""
    models = [
        ("source", source, ""),
        *((f"grown-{i}", node["model"], verdicts(node)) for i, node in enumerate(grown, 1)),
    ]
    rows = [
        (f'<a href="#{identity}">{escaped(model["name"].value)}</a>',
         told, *(figure_text(model["figures"].at(path), text) for _, path, text in _OVERVIEW))
        for identity, model, told in models
    ]  # fmt: skip
    return table(("", "held against the source", *(label for label, _, _ in _OVERVIEW)), rows, kind="overview")


def _source(source: Node) -> str:
    grown = what_was_done(source["growths"]) if len(source["growths"]) else ""
    return "".join([
        _where(source), grown, section("source-heads", "Heads of every layer", heads_figure(source)),
        sizes_section("source-sizes", [("source", source)]),
        attention_sections("source-attention", [("source", source)]), clone_section("source-clones", source),
    ])  # fmt: skip


def _grown(identity: str, source: Node, grown: Node) -> str:
    model = grown["model"]
    return "".join([
        _where(model), f'<p class="verdicts">{verdicts(grown)}</p>', what_was_done(model["growths"]),
        lineage_section(f"{identity}-heads", grown, source),
        sizes_section(f"{identity}-sizes", [("source", source), ("grown", model)]),
        certificate_section(f"{identity}-weights", grown), comparison_section(f"{identity}-logits", grown),
        attention_sections(f"{identity}-attention", [("source", source), ("grown", model)]),
        clone_section(f"{identity}-clones", model),
    ])  # fmt: skip


def _where(model: Node) -> str:
    return f'<p class="path"><code>{escaped(model["directory"].value)}</code></p>'


def _training(runs: Sequence[Node]) -> str:
    metrics = dict.fromkeys(curve["metric"].value for run in runs for curve in run["curves"])
    panels = [_metric(metric, runs) for metric in metrics]
    keys = legend([(f"s{i % NUM_SERIES}", "line", run["name"].value) for i, run in enumerate(runs)])
    told = "What the trainer wrote down at each step, unsmoothed; one line is one run."
    rows = [(escaped(run["name"].value), escaped(curve["metric"].value), figure_text(curve["num_points"], whole),
             figure_text(curve["steps"][len(curve["steps"]) - 1], "{:g}".format),
             figure_text(curve["values"][len(curve["values"]) - 1], "{:.4g}".format))
            for run in runs for curve in run["curves"]]  # fmt: skip
    return figure("Training curves", told, panels, before=keys) + table(
        ("run", "curve", "points", "last step", "last value"), rows
    )


def _metric(metric: str, runs: Sequence[Node]) -> str:
    lines = [
        Line(curve["steps"].value, list(curve["values"]), series(i), told=_at_step(run, curve))
        for i, run in enumerate(runs) for curve in run["curves"] if curve["metric"].value == metric
    ]  # fmt: skip
    return curves(metric, lines, x_axis="step", label=f"{metric} over training steps")


def _at_step(run: Node, curve: Node) -> Any:
    return lambda i: f"{run['name'].value}, step {curve['steps'].value[i]:g}"


def _made(top: Node) -> str:
    version = escaped(top["gdagrow"].value)
    return paragraph(*_run_on(top["tokens"])) + paragraph(
        f"Made by gdagrow {version}. Point at a mark or cell of a chart to read its figure. The page holds its data as "
        f"JSON in the element <code>{DATA_ID}</code>, the same that <code>gdagrow report --json</code> prints; it "
        "loads nothing and runs nothing."
    )


def _run_on(tokens: Node) -> Iterator[str]:
    sequences, length = (figure_text(tokens[key], whole) for key in ("num_sequences", "length"))
    yield f"Models were run on {sequences} &times; {length} tokens ({escaped(tokens['origin'].value)}) in "
    yield f"{escaped(tokens['dtype'].value)}, one half of a layer in memory at a time. "
