"""An experiment's tables in Markdown, from its results alone: the same results give the same text."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from gdagrow.experiment.results import Arm, Comparison, Results, Run
from gdagrow.experiment.statistics import Difference, Interval, detectable, deviation, differences, mean
from gdagrow.units import count_text, flops_text, times_text

_NOTHING: Final = "-"
_READING: Final = (
    "Losses are nats per byte on held-out text; `±` is the standard deviation over seeds. A difference is the arm's "
    "loss minus the reference's, paired by seed, so that negative is better. The verdict is that of a two-sided paired "
    "t test at 5% after Holm's correction for all the arms of its comparison; the intervals have no such correction, "
    "and the bootstrap's is too narrow for few seeds (for five it holds the true mean in about 85% of cases)."
)
_MAP_COLUMNS: Final = (
    ("entropy: signal", "signal_entropy", 3), ("noise", "noise_entropy", 3), ("difference", "difference_entropy", 3),
    ("top 5%: signal", "signal_top_5_percent", 4), ("noise", "noise_top_5_percent", 4),
    ("difference", "difference_top_5_percent", 4),
    ("negative", "difference_negative", 4), ("lambda", "lambda", 3),
)  # fmt: skip


def tables(results: Results) -> str:
    """All tables of an experiment as Markdown, whose sections have headings of the third level."""
    sections = [
        "\n\n".join([completeness(results), *_planned(results), _READING]),
        *(_comparison(results, comparison) for comparison in results.comparisons),
        *(make(results) for present, make in _FURTHER if present(results)),
    ]
    return "\n\n".join(sections) + "\n"


def completeness(results: Results) -> str:
    """How many of the runs are done, in a sentence."""
    seeds = f"{len(results.arms)} arms with seeds {', '.join(map(str, results.seeds))}"
    seconds = math.fsum(run.seconds for run in results.runs)
    took = (
        f"{seconds / 3600:.1f} hours on one thread" if seconds >= 3600 else f"{seconds / 60:.1f} minutes on one thread"
    )
    if results.complete:
        return f"Complete: all {results.num_planned} runs, {seeds}; {took}."
    done = {arm.name: len(results.runs_of(arm.name)) for arm in results.arms}
    short = [f"{_name(results, arm)} ({done[arm.name]})" for arm in results.arms if done[arm.name] < len(results.seeds)]
    return (
        f"**Partial: {len(results.runs)} of {results.num_planned} runs**, {seeds}; {took} so far. What follows may "
        f"still change. Short of {len(results.seeds)} runs: {', '.join(short)}."
    )


def _name(results: Results, arm: Arm) -> str:
    """An arm's label, with its name where others are told alike, as arms of several comparisons may be."""
    alike = sum(other.told == arm.told for other in results.arms) > 1
    return _plain(f"{arm.told} ({arm.name})" if alike else arm.told)


def _heads(arm: Arm) -> str:
    """The heads of a layer: `18 + 6, 6 KV` for signal and noise heads."""
    noise = f" + {arm.noise_heads}" if arm.noise_heads else ""
    return f"{arm.signal_heads}{noise}, {arm.kv_heads} KV"


def _planned(results: Results) -> Iterator[str]:
    if {"sd", "detectable"} <= set(results.planned):
        yield (
            f"Stated in advance: a paired standard deviation of {results.planned['sd']:.4f} in a pilot, with which "
            f"{len(results.seeds)} seeds see a difference of {results.planned['detectable']:.4f} in 80% of experiments."
        )
    else:
        yield "Nothing was stated in advance of what difference can be seen."


def _comparison(results: Results, comparison: Comparison) -> str:
    found = differences(results, comparison)
    reference = results.arm(comparison.reference)
    header = (
        "arm", "heads", "parameters", "tokens", "training FLOPs", "learning rate", "held-out loss", "difference",
        "95% by t", "95% by bootstrap", "p (Holm)", "seeds", "verdict",
    )  # fmt: skip
    rows = [(*_arm_cells(results, reference, reference), *[_NOTHING] * 4, _seeds(results, reference), "reference")]
    for difference in found:
        arm = results.arm(difference.arm)
        rows.append((*_arm_cells(results, arm, reference), *_difference_cells(results, difference)))
    return "\n\n".join([
        f"### {_plain(comparison.told)}", _equal(results, comparison), _table(header, rows), *_seen(results, found)
    ])  # fmt: skip


def _arm_cells(results: Results, arm: Arm, reference: Arm) -> tuple[str, ...]:
    def beside(text: str, count: float, of_reference: float) -> str:
        return text if arm is reference else f"{text} ({times_text(of_reference, count)})"

    return (
        _plain(arm.told),
        _heads(arm),
        beside(count_text(arm.parameters), arm.parameters, reference.parameters),
        beside(count_text(arm.tokens), arm.tokens, reference.tokens),
        beside(flops_text(round(arm.flops)), arm.flops, reference.flops),
        f"{arm.learning_rate:g}",
        _spread([run.loss for run in results.runs_of(arm.name)], 4),
    )


def _difference_cells(results: Results, difference: Difference) -> tuple[str, ...]:
    return (
        _spread(difference.values, 4, sign="+"),
        _interval(difference.student),
        _interval(difference.bootstrap),
        _NOTHING if difference.p is None else f"{difference.adjusted_p:.3f}".replace("0.000", "< 0.001"),
        _seeds(results, results.arm(difference.arm)),
        difference.verdict,
    )


def _equal(results: Results, comparison: Comparison) -> str:
    """What is equal, and what the losses stand beside."""
    reference = results.arm(comparison.reference)
    arms = [reference, *map(results.arm, comparison.arms)]
    contexts = sorted({arm.context_length for arm in arms})
    texts = [text for text in results.texts if text.name in {arm.text for arm in arms}]
    beside = "; ".join(f"{_plain(text.name)}: bigram {text.bigram:.4f}, gzip -9 {text.gzip:.4f}" for text in texts)
    return (
        f"Equal {comparison.matched}; reference: {_plain(reference.told)}; contexts of "
        f"{' and '.join(map(str, contexts))} tokens. Beside the losses, in nats per byte: {beside}."
    )


def _seen(results: Results, found: Sequence[Difference]) -> Iterator[str]:
    sds = [difference.sd for difference in found if difference.sd is not None]
    made = f"{len(found)} comparison{'s were' if len(found) != 1 else ' was'} made"
    if not sds:
        yield f"{made}; none has two pairs of runs yet."
        return
    typical, seeds = math.sqrt(math.fsum(sd**2 for sd in sds) / len(sds)), len(results.seeds)
    spread = f" ({min(sds):.4f} to {max(sds):.4f})" if len(sds) > 1 else ""
    power = f"{detectable(typical, seeds):.4f} in 80% of experiments" if seeds > 1 else "no size"
    after = f", {detectable(typical, seeds, comparisons=len(found)):.4f} at the first step of Holm's correction"
    yield (
        f"{made}. Seen: paired standard deviations of {typical:.4f}{spread}, with which {seeds} seeds see a difference "
        f"of {power}{after if len(found) > 1 and seeds > 1 else ''}."
    )


def _seeds(results: Results, arm: Arm) -> str:
    return f"{len(results.runs_of(arm.name))} / {len(results.seeds)}"


def _texts(results: Results) -> str:
    rows = [
        (
            _plain(text.name), _plain(text.description), _pair(text.documents), _pair(text.tokens),
            f"{text.bigram:.4f}", f"{text.gzip:.4f}",
        )
        for text in results.texts
    ]  # fmt: skip
    header = ("text", "from", "documents (training / held out)", "tokens (training / held out)", "bigram", "gzip -9")
    return f"### Texts\n\n{_table(header, rows)}"


def _pair(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} / {counts[1]:,}"


def _tuning(results: Results) -> str:
    rates = sorted({rate for losses in results.tuning.values() for rate in losses}, key=float)
    rows = []
    for arm in (arm for arm in results.arms if arm.name in results.tuning):
        losses = results.tuning[arm.name]
        best = min(losses, key=lambda rate: (losses[rate], float(rate)), default=None)
        ends = {min(losses, key=float), max(losses, key=float)} if losses else set()
        cells = [_swept(losses.get(rate), rate == best) for rate in rates]
        rows.append((_name(results, arm), *cells, f"{arm.learning_rate:g}", "yes" if best in ends else "no"))
    header = ("arm", *rates, "taken", "lowest at an end of the sweep")
    told = f"Held-out loss of the sweep, its lowest in bold; `{_NOTHING}` was not tried, or diverged."
    return f"### Learning rates\n\n{told}\n\n{_table(header, rows)}"


def _swept(loss: float | None, lowest: bool) -> str:
    if loss is None:
        return _NOTHING
    return f"**{loss:.4f}**" if lowest else f"{loss:.4f}"


def _growth(results: Results) -> str:
    rows = []
    for arm in results.arms:
        found = [run.growth for run in results.runs_of(arm.name) if run.growth]
        if not found:
            continue
        changes = [abs(growth["after"] - growth["before"]) for growth in found if {"before", "after"} <= set(growth)]
        rows.append((
            _name(results, arm), _name(results, results.arm(arm.grown_from)) if arm.grown_from else _NOTHING,
            _fields(arm.growth),
            _spread_of(found, "before", 4), _spread_of(found, "after", 4),
            f"{max(changes):.1e}" if changes else _NOTHING,
            _spread_of(found, "transient", 4, sign="+"), _spread_of(found, "copy_cosine", 5),
            f"{len(found)} / {len(results.seeds)}",
        ))  # fmt: skip
    header = (
        "arm", "grown from", "growth", "loss right before", "right after", "largest change", "transient",
        "cosine of copies at the end", "seeds",
    )  # fmt: skip
    told = (
        "Transient: mean training loss of the first 20 steps after the growth minus that of the same steps of the arm "
        "it was grown from. Largest change: of the held-out loss by the growth itself, over all seeds."
    )
    return f"### Growth\n\n{told}\n\n{_table(header, rows)}"


def _fields(growth: Mapping[str, Any] | None) -> str:
    return _plain(", ".join(_flat(growth or {}))) or _NOTHING


def _flat(fields: Mapping[str, Any]) -> Iterator[str]:
    """Each field with its value, in the order that a file of them has, whatever it was before."""
    for key, value in sorted(fields.items()):
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield f"{key} {value if isinstance(value, str) else json.dumps(value)}"


def _maps(results: Results) -> str:
    rows = []
    for arm in results.arms:
        found = [at_end(run) for run in results.runs_of(arm.name) if run.maps]
        if not found:
            continue
        cells = (_spread_of(found, key, digits) for _, key, digits in _MAP_COLUMNS)
        seeds = f"{len(found)} / {len(results.seeds)}"
        rows.append((_name(results, arm), _plain(arm.attention), str(arm.context_length), *cells, seeds))
    header = ("arm", "attention", "context", *(told for told, *_ in _MAP_COLUMNS), "seeds")
    told = (
        "Means over heads and layers. Entropy in nats; top 5%: share of the weight on the 5% of positions that have "
        "most of it; negative: share of the positions where the difference is below zero."
    )
    return f"### Attention maps at the end\n\n{told}\n\n{_table(header, rows)}"


def at_end(run: Run) -> dict[str, float]:
    """The figures of a run's last maps as means over its layers."""
    layers = max(run.maps, key=lambda maps: maps.tokens).layers
    return {key: math.fsum(layer[key] for layer in layers) / len(layers) for key in layers[0]}


_Part = tuple[Callable[[Results], bool], Callable[[Results], str]]
# When a further table is made, and what makes it.
_FURTHER: Final[tuple[_Part, ...]] = (
    (lambda results: any(run.growth for run in results.runs), _growth),
    (lambda results: any(run.maps for run in results.runs), _maps),
    (lambda results: any(results.tuning.values()), _tuning),
    (lambda results: bool(results.texts), _texts),
)


def _spread_of(found: Sequence[Mapping[str, float]], key: str, digits: int, sign: str = "") -> str:
    return _spread([figures[key] for figures in found if key in figures], digits, sign)


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    center, sd = mean(values), deviation(values)
    if center is None:
        return _NOTHING
    return f"{center:{sign}.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def _interval(interval: Interval | None) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else _NOTHING


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Words of a recipe as they are: nothing in them ends a cell or a line, or is taken for emphasis or a tag."""
    return re.sub(r"([\\|*_`<\[])", r"\\\1", " ".join(text.split()))
