"""The results of an experiment as a file: the same numbers back, and nothing else taken for them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.errors import ReportError
from gdagrow.experiment.results import Results, read_results, write_results
from tests.made_results import growth_results, ratio_results

MADE = {"ratio": ratio_results, "growth": growth_results}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_results_come_back(tmp_path: Path, made: Callable[[], Results]) -> None:
    path, again = tmp_path / "results.json", tmp_path / "again.json"
    write_results(made(), path)
    assert read_results(path) == made()
    write_results(read_results(path), again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["again.json", "results.json"]
    assert path.read_text(encoding="utf-8").startswith('{\n "arms": [\n  {\n   "attention"')


@settings(max_examples=50, deadline=None)
@given(loss=st.floats(allow_nan=False, allow_infinity=False), tokens=st.integers(0, 2**62))
def test_numbers_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, loss: float, tokens: int) -> None:
    path = tmp_path_factory.mktemp("numbers") / "results.json"
    made = growth_results()
    run = replace(made.runs[0], loss=loss, curve=((tokens, loss),))
    write_results(replace(made, runs=(run,)), path)
    (found,) = read_results(path).runs
    assert (found.loss.hex(), found.curve[0][0], found.curve[0][1].hex()) == (loss.hex(), tokens, loss.hex())


def test_what_is_complete() -> None:
    assert (ratio_results().complete, ratio_results().num_planned) == (True, 40)
    assert (growth_results().complete, len(growth_results().runs), growth_results().num_planned) == (False, 13, 20)
    assert [run.seed for run in growth_results().runs_of("uniform")] == [0, 1, 3]


def edit(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


WRONG = {
    "text for a number": (edit(("runs", 0, "seed"), "0"), 'runs.0.seed: input should be a valid integer, got "0"'),
    "truth for a number": (edit(("runs", 0, "loss"), True), "runs.0.loss: input should be a valid number, got true"),
    "a number of nothing": (edit(("texts", 0, "gzip"), None), "texts.0.gzip: input should be a valid number, got null"),
    "half a document": (edit(("texts", 0, "documents"), [1, 2.5]), "texts.0.documents.1: input should be a valid int"),
    "three counts": (edit(("texts", 0, "tokens"), [1, 2, 3]), "texts.0.tokens: tuple should have at most 2 items"),
    "a field too many": (edit(("arms", 1, "colour"), "red"), "unknown key arms.1.colour; run"),
    "a field too few": (drop("comparisons", 0, "matched"), "comparisons.0.matched is missing; run"),
    "no list": (edit(("runs",), {}), "runs: input should be a valid array, got {}"),
    "unknown text": (edit(("arms", 1, "text"), "poems"), "arm signal: unknown text poems"),
    "unknown source": (edit(("arms", 1, "grown_from"), "x"), "arm signal: unknown arm x"),
    "unknown arm": (edit(("comparisons", 0, "arms"), ["x"]), "comparison 1: unknown arm x"),
    "against itself": (edit(("comparisons", 0, "arms"), ["none"]), "comparison 1: arm none twice"),
    "two arms of a name": (edit(("arms", 1, "name"), "none"), "arm none twice"),
    "a run of no arm": (edit(("runs", 0, "arm"), "x"), "run x with seed 0: unknown arm x"),
    "a run of no seed": (edit(("runs", 0, "seed"), 9), "run none with seed 9: unknown seed 9"),
    "a run twice": (edit(("runs", 1, "seed"), 0), "run none with seed 0 twice"),
    "seeds twice": (edit(("seeds",), [0, 0, 1, 2, 3, 4]), "seed 0 twice"),
    "unknown growth": (edit(("runs", 5, "growth"), {"later": 1.0}), "unknown figure of growth later"),
    "unknown map": (edit(("runs", 0, "maps"), [{"tokens": 1, "layers": [{"lamda": 1.0}]}]), "figure of maps lamda"),
    "maps of nothing": (edit(("runs", 0, "maps"), [{"tokens": 1, "layers": []}]), "maps of no layer"),
    "uneven maps": (
        edit(("runs", 0, "maps"), [{"tokens": 1, "layers": [{"lambda": 1.0}, {}]}]), "layers have different figures"
    ),
    "unknown plan": (edit(("planned",), {"variance": 1.0}), "planned: unknown figure variance"),
    "tuning of no arm": (edit(("tuning",), {"x": {"0.1": 2.0}}), "tuning: unknown arm x"),
    "tuning of no rate": (edit(("tuning",), {"none": {"fast": 2.0}}), "tuning of none: 'fast' is no learning rate"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), WRONG.values(), ids=WRONG)
def test_broken_results_are_told(tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str) -> None:
    path = tmp_path / "results.json"
    write_results(growth_results(), path)
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ReportError) as error:
        read_results(path)
    message = str(error.value)
    assert told in message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(growth_results(), path)
    content = json.loads(path.read_bytes())
    content["title"], content["runs"][2]["loss"] = 3, "low"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ReportError) as error:
        read_results(path)
    assert str(error.value) == (
        f"{path}: not the results of an experiment: title: input should be a valid string, got 3; "
        'runs.2.loss: input should be a valid number, got "low"; run the experiment again'
    )


@pytest.mark.parametrize(
    ("raw", "told"),
    [(b"{", "not valid JSON"), (b'{"a": 1, "a": 2}', "duplicate keys: 'a'"), (b'{"a": NaN}', "NaN is not a JSON"),
     (b"[]", "expected a JSON object, got list"), (b"\xff", "not valid JSON")],
)  # fmt: skip
def test_what_is_no_json(tmp_path: Path, raw: bytes, told: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(raw)
    with pytest.raises(ReportError, match=told):
        read_results(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"results.json cannot be read \(No such file or directory\); give"):
        read_results(tmp_path / "results.json")


def test_nothing_is_written_of_what_cannot_be_read(tmp_path: Path) -> None:
    made, path = growth_results(), tmp_path / "results.json"
    diverged = replace(made, runs=(replace(made.runs[0], loss=math.nan),))
    with pytest.raises(ReportError, match="results that JSON cannot hold"):
        write_results(diverged, path)
    with pytest.raises(ReportError, match="results that contradict themselves: run none with seed 0 twice; run it"):
        write_results(replace(made, runs=(made.runs[0], made.runs[0])), path)
    assert list(tmp_path.iterdir()) == []
