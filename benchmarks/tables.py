"""The tables of a page, made from the figures of its benchmarks.

    python benchmarks/tables.py docs/benchmarks.json docs/benchmarks.md

Replaces what stands between `<!-- table NAME -->` and `<!-- end -->` in the page by the table of the benchmark NAME.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import BUSY

Row = Sequence[str]
_PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page_with_tables(page: str, results: Mapping[str, Any]) -> str:
    """The page with the tables of `results`; raises KeyError where a benchmark has not been run."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{table_of(found[2], results)}\n\n{found[3]}", page)


def table_of(name: str, results: Mapping[str, Any]) -> str:
    """One benchmark's table, and a line on when it was made, in Markdown."""
    if name == "machine":
        return _machines(results)
    entry = results["benchmarks"][name]
    return "\n".join([*TABLES[name](entry["cases"]), "", _provenance(name, entry)])


def ratios(case: Mapping[str, Any], arm: str, base: str, key: str = "wall") -> list[float]:
    """`arm` over `base`, round by round."""
    return [turn[arm][key] / turn[base][key] for turn in case["rounds"]]


def _expand(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = ("growth", "output", "arm", "GB/s", "rate: of `dd`", "of `dd` past the cache", "of `cp`", "CPU s a GB",
            "RssAnon above Python, torch")  # fmt: skip
    yield from _table(head, (row for case in cases for row in _disk_rows(case, ("dd", "direct", "cp"))))


def _disk_rows(case: Mapping[str, Any], bases: Sequence[str]) -> Iterator[Row]:
    facts = case["facts"]
    label = f"{case['name']}" + (f" ({facts['files']})" if facts["files"] > 1 else "")
    size = facts["output_bytes"] / 1e9
    for arm in ("exact", "noise", *bases):
        found = [_spread(ratios(case, base, arm)) if base != arm else "" for base in bases]
        above = "" if arm in bases else _above(case, arm)
        first = (label, f"{size:.2f} GB") if arm == "exact" else ("", "")
        yield (
            *first,
            arm,
            f"{size / _median(case, arm):.2f}",
            *found,
            f"{_median(case, arm, 'cpu') / size:.2f}",
            above,
        )


def _sizes(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    fits = {arm: fit(cases, arm) for arm in ("exact", "noise")}
    measured = ("s", "off the line", "RssAnon above Python, torch")
    head = ("output", *(f"{arm}: {what}" for arm in fits for what in measured), "rate of noise: of `dd`")
    rows = []
    for case in cases:
        facts, cells = case["facts"], []
        for arm, (start, each, _) in fits.items():
            seconds, line = _median(case, arm), start + each * facts["output_bytes"] / 1e9
            cells += [f"{seconds:.2f}", f"{(seconds / line - 1) * 100:+.0f} %", _above(case, arm)]
        rows.append((f"{facts['output_bytes'] / 1e9:.2f} GB", *cells, _spread(ratios(case, "dd", "noise"))))
    yield from _table(head, rows)
    yield ""
    told = (
        f"{arm} takes {start:.2f} s and {each:.2f} s a GB (R² {square:.4f})"
        for arm, (start, each, square) in fits.items()
    )
    yield f"By least squares over every run, {'; '.join(told)}."


def fit(cases: Sequence[Mapping[str, Any]], arm: str) -> tuple[float, float, float]:
    """Seconds as `a + b * GB` of output: a, b and R² of all runs of an arm."""
    points = [(case["facts"]["output_bytes"] / 1e9, turn[arm]["wall"]) for case in cases for turn in case["rounds"]]
    sizes, seconds = zip(*points, strict=True)
    each, start = statistics.linear_regression(sizes, seconds)
    return start, each, statistics.correlation(sizes, seconds) ** 2


def _above(case: Mapping[str, Any], arm: str) -> str:
    """The most memory of an arm above an interpreter, and above one that has imported torch."""
    most = _most(case, arm, "anonymous")
    return ", ".join(f"{most - case['facts'][f'{base}_anonymous']:.0f}" for base in ("python", "torch")) + " MiB"


def _passes(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    (case,) = cases
    rows = []
    for arm in case["rounds"][0]:
        read = _spread([turn[arm]["device_read"] / case["facts"]["source_bytes"] for turn in case["rounds"]])
        wrote = [turn[arm]["device_written"] / turn[arm].get("output_bytes", 1) for turn in case["rounds"]]
        rows.append((f"`{arm}`", read, _spread(wrote) if arm == "expand" else ""))
    kept, size = (case["facts"][key] / 1e9 for key in ("page_cache_bytes", "source_bytes"))
    head = f"a source of {size:.1f} GB, {kept:.1f} GB of which stay in memory"
    yield from _table((head, "read from the disk: times the source", "written to it: times the output"), rows)


def _diff_weights(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = (
        "source and grown",
        "growth",
        "rate: of `cat`",
        "seconds",
        "CPU s",
        "`cat`: CPU s",
        "RssAnon, all processes",
    )
    yield from _table(head, (
        (f"{case['facts']['bytes'] / 1e9:.2f} GB {case['facts']['dtype']}", f"`{case['facts']['growth']}`",
         _spread(ratios(case, "cat", "diff")), f"{_median(case, 'diff'):.2f}", f"{_median(case, 'diff', 'cpu'):.1f}",
         f"{_median(case, 'cat', 'cpu'):.1f}", f"{_most(case, 'diff', 'anonymous'):.0f} MiB")
        for case in cases
    ))  # fmt: skip


def _diff_logits(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = ("source and grown", "seconds: times", "CPU s: times", "diff: CPU s", "plain: loading + running s",
            "diff: RssAnon above torch", "plain: RssAnon above torch")  # fmt: skip
    rows = []
    for case in cases:
        facts, torch = case["facts"], case["facts"]["torch_anonymous"]
        plain = f"{_median(case, 'forwards', 'loading'):.0f} + {_median(case, 'forwards', 'running'):.0f}"
        above = [f"{_most(case, arm, 'anonymous') - torch:.0f} MiB" for arm in ("diff", "forwards")]
        rows.append((f"{facts['bytes'] / 1e9:.2f} GB {facts['dtype']}, `{facts['growth']}`",
                     _spread(ratios(case, "diff", "forwards")), _spread(ratios(case, "diff", "forwards", "cpu")),
                     f"{_median(case, 'diff', 'cpu'):.0f}", plain, *above))  # fmt: skip
    yield from _table(head, rows)


def _state(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    (case,) = cases
    rates = [turn["weights"]["wall"] / turn["weights"]["bytes"] * turn["state"]["bytes"] / turn["state"]["wall"]
             for turn in case["rounds"]]  # fmt: skip
    rows = []
    for arm, name in (("weights", "weights alone"), ("state", "weights and moments")):
        size = case["rounds"][0][arm]["bytes"] / 1e9
        above = _most(case, arm, "anonymous") - case["facts"]["torch_anonymous"]
        of_weights = _spread(rates) if arm == "state" else ""
        rows.append((name, f"{size:.2f} GB", f"{size / _median(case, arm):.2f}", of_weights,
                     f"{_median(case, arm, 'cpu') / size:.2f}", f"{above:.0f} MiB"))  # fmt: skip
    yield from _table(("arm", "output", "GB/s", "rate: of the weights'", "CPU s a GB", "RssAnon above torch"), rows)


def _start_up(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    (case,) = cases
    rows = []
    for arm in case["rounds"][0]:
        walls = sorted(turn[arm]["wall"] for turn in case["rounds"])
        name = {"python": "`python -c pass`", "import torch": "`python -c 'import torch'`"}.get(arm, f"`gdagrow {arm}`")
        more = [turn[arm]["wall"] - turn["python"]["wall"] for turn in case["rounds"]]
        rows.append((name, f"{statistics.median(walls):.3f} ({walls[0]:.3f}-{walls[-1]:.3f})",
                     "" if arm == "python" else f"{statistics.median(more):.3f}", f"{_median(case, arm, 'cpu'):.3f}",
                     f"{_most(case, arm, 'resident'):.0f} MiB"))  # fmt: skip
    rows.sort(key=lambda row: float(row[1].split()[0]))
    yield from _table(("command", "seconds", "more than Python", "CPU s", "VmHWM"), rows)


_MODELS = {"gda": "GDA 3:1", "differential": "differential", "gda, PolyNorm": "GDA 3:1, PolyNorm"}
_STEPS = ("model, forward", "model, forward and backward", "attention, forward", "attention, forward and backward")


def _model(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = ("", "dtype", "threads", "standard: tokens/s", *(f"time: {name} over standard" for name in _MODELS.values()),
            "CPU s: GDA 3:1 over standard")  # fmt: skip
    rows = []
    for step in _STEPS:
        for case in cases:
            if case["name"].split(", ", 2)[2] == step:
                facts = case["facts"]
                found = [_spread(ratios(case, arm, "standard")) if arm in case["rounds"][0] else "" for arm in _MODELS]
                rows.append((step, facts["dtype"], str(facts["threads"]),
                             f"{facts['tokens'] / _median(case, 'standard'):.0f}", *found,
                             _spread(ratios(case, "gda", "standard", "cpu"))))  # fmt: skip
    yield from _table(head, rows)


def _model_memory(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    (case,) = cases
    (turn,) = case["rounds"]
    yield from _table(("", *(_MODELS.get(arm, arm) for arm in turn)), [
        (name, *(f"{found[key]:.0f} MiB" for found in turn.values()))
        for name, key in (("forward", "forward_mib"), ("forward and backward", "backward_mib"))
    ])  # fmt: skip


def _model_profile(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    kinds = {"kernel": "fused attention", "projections": "projections", "rest": "all else"}
    rows = []
    for case in cases:
        for arm in case["rounds"][0]:
            whole = statistics.median(sum(turn[arm].values()) for turn in case["rounds"])
            cells = (f"{_median(case, arm, kind):.1f}, {statistics.median(ratios(case, arm, 'standard', kind)):.2f}"
                     for kind in kinds)  # fmt: skip
            rows.append((case["facts"]["dtype"], _MODELS.get(arm, arm), f"{whole:.1f}", *cells))
    yield from _table(("", "", "ms", *(f"{kind}: ms, times standard" for kind in kinds.values())), rows)


def _full_size(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    (case,) = cases
    (turn,) = case["rounds"]
    facts, logits = case["facts"], case["facts"]["logits"]
    told = {
        "expand": f"{facts['ratio_to_dd']} of dd",
        "diff_weights": f"all {facts['certificate']['num_tensors']} tensors fold back onto the source",
        "diff_logits": f"relative error {logits['max_rel']:.1e} where rounding allows {logits['tolerance']:.1e}",
    }
    yield from _table(("step", "wall s", "CPU s", "RssAnon, peak", ""), [
        (f"`{step}`", f"{found['wall']:.0f}", f"{found['cpu']:.0f}",
         f"{found['anonymous']:.0f} MiB" if "anonymous" in found else "", told.get(step, "the baseline"))
        for step, found in turn.items()
    ])  # fmt: skip


TABLES: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], Iterator[str]]] = {
    "start-up": _start_up, "model": _model, "model-memory": _model_memory, "model-profile": _model_profile,
    "expand": _expand, "sizes": _sizes, "passes": _passes, "state": _state, "diff-weights": _diff_weights,
    "diff-logits": _diff_logits, "full-size": _full_size,
}  # fmt: skip


def _machines(results: Mapping[str, Any]) -> str:
    told: dict[str, list[str]] = {}
    for name, entry in results["benchmarks"].items():
        facts = {**entry["machine"], **entry["versions"], **entry["environment"]}
        told.setdefault(", ".join(f"{key} {value}" for key, value in facts.items()), []).append(name)
    if len(told) == 1:
        return f"{next(iter(told))}."
    return "\n".join(f"- {', '.join(names)}: {facts}." for facts, names in told.items())


def _provenance(name: str, entry: Mapping[str, Any]) -> str:
    rounds = [len(case["rounds"]) for case in entry["cases"]]
    number = str(min(rounds)) if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    told = f"`{entry['command']}`: {number} round{'s' * (number != '1')} on {entry['date']}"
    busy = [case["busy_before"] for case in entry["cases"] if case["busy_before"] > BUSY]
    if busy:
        cases = f"{len(busy)} of {len(rounds)} case{'s' * (len(rounds) > 1)}"
        told += f". **The machine was not idle**: other programs took up to {max(busy):.0%} of it before {cases}"
    return f"{told}."


def _median(case: Mapping[str, Any], arm: str, key: str = "wall") -> float:
    return statistics.median(turn[arm][key] for turn in case["rounds"])


def _most(case: Mapping[str, Any], arm: str, key: str) -> float:
    return max(turn[arm][key] for turn in case["rounds"])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


def _table(head: Row, rows: Iterator[Row] | Sequence[Row]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    data, target = map(Path, sys.argv[1:])
    target.write_text(page_with_tables(target.read_text(), json.loads(data.read_text())))
