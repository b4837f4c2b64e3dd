"""What the page says of whether a growth kept the function: the weights folded back, and what both models compute."""

import math
from collections.abc import Sequence
from typing import Final

from gdagrow.report.charts import Line, curves
from gdagrow.report.markup import (
    Format,
    badge,
    escaped,
    few_digits,
    figure,
    figure_text,
    legend,
    missing,
    paragraph,
    percent,
    section,
    table,
    whole,
)
from gdagrow.report.node import Node
from gdagrow.report.panel import colour
from gdagrow.verify.parts import LARGEST_TOLERANCE

_MAX_TENSORS: Final = 12
_LOGITS: Final[tuple[tuple[str, str, Format], ...]] = (
    ("largest difference of a logit", "max_abs", few_digits),
    ("relative to the largest logit", "max_rel", few_digits),
    ("tolerance for that: what rounding alone may do", "tolerance", few_digits),
    ("KL divergence, nats a token", "kl", few_digits),
    ("same most likely token", "top1_agreement", percent),
    ("loss of the source, nats a token", "source_loss", "{:.4f}".format),
    ("loss of the grown model", "grown_loss", "{:.4f}".format),
)
# Parts of a layer, and how their charts are headed.
_PARTS: Final = (
    ("signal heads", "signal heads"),
    ("noise heads", "noise heads"),
    ("differences", "differences, after lambda"),
    ("attention", "attention, added to the stream"),
    ("mlp", "MLP, added to the stream"),
    ("residual", "residual stream"),
)


def verdicts(grown: Node) -> str:
    """Badges that say what the evidence came to."""
    certificate, comparison = grown["certificate"], grown["comparison"]
    weights = ("weights not folded", "none") if not certificate else _verdict(
        certificate, "weights fold back, bit for bit", "weights differ"
    )  # fmt: skip
    logits = ("logits not compared", "none") if not comparison else _verdict(
        comparison, "logits within rounding", "logits differ"
    )  # fmt: skip
    return f"{badge(*weights)} {badge(*logits)}"


def _verdict(evidence: Node, same: str = "the same function", different: str = "different") -> tuple[str, str]:
    return (same, "good") if evidence["equivalent"].value else (different, "bad")


def certificate_section(identity: str, grown: Node) -> str:
    """Whether every weight folds back onto the source."""
    heading = "The weights, folded back"
    certificate = grown["certificate"]
    if not certificate:
        return section(identity, heading, missing("not folded", grown["problems"]["certificate"].value))
    tensors, weights = (figure_text(certificate[key], whole) for key in ("num_tensors", "num_elements"))
    told = (
        "Every copy is the source's bits, and all parts of a split sum to the source's weight in exact arithmetic."
        if certificate["equivalent"].value
        else "Not everything folds back onto the source; after training that is as it should be."
    )
    maps = f"with the index maps of <code>{escaped(certificate['maps'].value)}</code>"
    checked = f"{tensors} tensors of {weights} weights were checked, {maps}; no model was run."
    content = [paragraph(badge(*_verdict(certificate)), f" {told} {checked}")]
    if len(certificate["settings"]):
        rows = [(_code(setting["key"]), _code(setting["source"]), _code(setting["grown"]))
                for setting in certificate["settings"]]  # fmt: skip
        content.append("<p>Settings that change the function:</p>" + table(("config.json", "source", "grown"), rows))
    if differences := list(certificate["differences"]):
        found = [(_code(difference["name"]), *_difference(difference)) for difference in differences[:_MAX_TENSORS]]
        content.append(table(("tensor", "wrong", "largest distance"), found))
        if (more := len(differences) - _MAX_TENSORS) > 0:
            content.append(paragraph(f"... and {more} more, all of them in the data of this page."))
    return section(identity, heading, *content)


def _code(node: Node) -> str:
    return f"<code>{escaped(node.value)}</code>" if node else "absent"


def _difference(difference: Node) -> tuple[str, str]:
    if difference["problem"]:
        return escaped(difference["problem"].value), ""
    return figure_text(difference["num_wrong"], whole), figure_text(difference["largest"])


def comparison_section(identity: str, grown: Node) -> str:
    """The logits against what rounding may do, and the error of each part of each layer."""
    heading = "What both compute"
    comparison = grown["comparison"]
    if not comparison:
        return section(identity, heading, missing("not compared", grown["problems"]["comparison"].value))
    sequences, length = (figure_text(comparison[key], whole) for key in ("num_sequences", "length"))
    tokens = f"{sequences} &times; {length} tokens, in {escaped(comparison['dtype'].value)}"
    told = f" Both models ran on the same {tokens}. {_finding(comparison)}"
    content = [paragraph(badge(*_verdict(comparison)), told)]
    figures = table((), [(label, figure_text(comparison[key], text)) for label, key, text in _LOGITS], kind="sizes")
    if len(comparison["changes"]):
        rows = [tuple(escaped(change[key].value) for key in ("what", "source", "grown"))
                for change in comparison["changes"]]  # fmt: skip
        figures += table(("changed", "source", "grown"), rows, kind="sizes")
    content.append(f'<div class="beside">{figures}</div>')
    if comparison["parts_not_compared"]:
        content.append(missing("layers not compared", comparison["parts_not_compared"].value))
    return section(identity, heading, *content, _errors(list(comparison["parts"])))


def _finding(comparison: Node) -> str:
    """What the logits, the parts and the decoded texts say, in sentences."""
    error, tolerance = comparison["max_rel"], comparison["tolerance"]
    within = error and tolerance and error.value <= tolerance.value
    told = f"The logits differ by {'no more' if within else 'more'} than rounding alone may make them."
    if first := comparison["first_difference"]:
        where = f"layer {figure_text(first['layer'], str)}" if first["layer"] else "the embedding"
        what = escaped(first["head"].value or first["part"].value)
        told += f" The first part that rounding does not explain: {where}, {what}, by {figure_text(first['max_rel'])} "
        told += f"where {figure_text(first['tolerance'])} is allowed."
    if decoding := comparison["decoding"]:
        count, same = len(decoding["source"]), decoding["same"].value
        told += f" Decoding greedily after {figure_text(decoding['prompt_length'], whole)} tokens, "
        told += f"both wrote the same {count}." if same else f"they parted at token {count}."
    return told


def _errors(parts: Sequence[Node]) -> str:
    if not parts:
        return ""
    limits = _limits(parts)
    panels = [
        _error(name, title, [part for part in parts if part["part"].value == name], limits) for name, title in _PARTS
    ]
    told = (
        "The largest difference of each part of each layer from the source's, each grown index held against the one "
        "that it was cloned from, over the part's largest value. Rounding alone explains the points below the dashed "
        "line. A hollow point at the foot is an error of exactly zero, a red cross one that rounding does not explain."
    )
    keys = legend([("grown", "line", "error"), ("muted", "dashed", "tolerance: what rounding alone may do")])
    return figure("Error of each part, by layer", told, panels, before=keys)


def _error(name: str, title: str, parts: Sequence[Node], limits: tuple[float, float]) -> str:
    layers = [part["layer"].value for part in parts]

    def told(i: int) -> str:
        head = parts[i]["head"]
        return f"layer {layers[i]}, {name}" + (f", most in {head.value}" if head else "")

    lines = [
        Line(layers, [part["max_rel"] for part in parts], colour("grown"), told=told),
        Line(layers, [part["tolerance"] for part in parts], colour("muted"), dashed=True),
    ]
    label = f"Relative error of {name} by layer"
    return curves(title, lines, x_axis="layer", limits=limits, bad=[_is_bad(part) for part in parts], label=label)


def _is_bad(part: Node) -> bool:
    """Not what `PartDifference.agrees` calls the same."""
    error, tolerance = part["max_rel"].value, part["tolerance"].value
    return error is None or (tolerance is not None and tolerance < error and tolerance <= LARGEST_TOLERANCE)


def _limits(parts: Sequence[Node]) -> tuple[float, float]:
    """Whole powers of ten around every error and tolerance but zeros."""
    known = [part[key].value for part in parts for key in ("max_rel", "tolerance") if part[key].value] or [1e-16, 1.0]
    return 10.0 ** (math.floor(math.log10(min(known))) - 1), 10.0 ** math.ceil(math.log10(max(known)) + 0.2)
