"""Training curves: what is read of a run directory, what is refused, and how long curves are kept short."""

import json
from pathlib import Path
from typing import Any

import pytest

from gdagrow.errors import ReportError
from gdagrow.report.training import MAX_POINTS, read_run


def write_metrics(directory: Path, entries: list[Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return directory


def test_a_trainers_state(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 3.0, "grad_norm": 9.0}, {"step": 2, "loss": 2.5, "epoch": 1.0},
           {"step": 2, "eval_loss": 2.75, "eval_runtime": 4.0}, {"step": 2, "train_loss": 2.7}]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 2}))
    run = read_run(tmp_path)
    assert (run.name, run.file) == (tmp_path.name, "trainer_state.json")
    found = {curve.metric: (curve.steps, curve.values, curve.num_points) for curve in run.curves}
    assert found == {"loss": ((1, 2), (3.0, 2.5), 2), "eval_loss": ((2,), (2.75,), 1)}


def test_metrics_line_by_line(tmp_path: Path) -> None:
    entries = [{"step": 10, "loss": 1.5, "lr": 0.1, "note": "text", "done": False, "tokens": None},
               {"step": 20, "loss": float("nan"), "lr": 0.2, "eval_loss": 1.25}]  # fmt: skip
    run = read_run(write_metrics(tmp_path / "a run", entries))
    found = {curve.metric: (curve.steps, curve.values) for curve in run.curves}
    assert list(found) == ["loss", "eval_loss", "lr"]
    assert found == {"loss": ((10,), (1.5,)), "eval_loss": ((20,), (1.25,)), "lr": ((10, 20), (0.1, 0.2))}


@pytest.mark.parametrize("count", [1, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, 4 * MAX_POINTS + 3])
def test_long_curves_are_thinned_evenly_and_keep_both_ends(tmp_path: Path, count: int) -> None:
    (curve,) = read_run(write_metrics(tmp_path, [{"step": i, "loss": float(i)} for i in range(count)])).curves
    assert curve.num_points == count
    assert curve.steps == curve.values
    assert (curve.steps[0], curve.steps[-1]) == (0, count - 1)
    assert min(count, MAX_POINTS // 2) <= len(curve.steps) <= MAX_POINTS
    distances = {after - before for before, after in zip(curve.steps[:-2], curve.steps[1:-1], strict=True)}
    assert len(distances) <= 1


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "expected a training run, a directory with trainer_state.json or metrics.jsonl, and found neither"),
        ({"metrics.jsonl": '{"step": 1}\n'}, "expected entries with a step and a loss, found none"),
        ({"metrics.jsonl": '{"step": 1, "loss": 2}\nnonsense\n'}, "line 2: expected a JSON object with a step"),
        ({"metrics.jsonl": '{"loss": 2}\n'}, "line 1: expected a JSON object with a step"),
        ({"metrics.jsonl": '{"step": true, "loss": 2}\n'}, "line 1: expected a JSON object with a step"),
        ({"metrics.jsonl": "[" * 100_000}, "line 1: expected a JSON object with a step"),
        ({"trainer_state.json": "{}"}, "expected a Trainer's state with a log_history"),
        ({"trainer_state.json": '{"log_history": [3]}'}, "expected a Trainer's state with a log_history"),
        ({"trainer_state.json": '{"log_history": []}'}, "expected entries with a step and a loss"),
        ({"trainer_state.json": "nonsense"}, "expected a Trainer's state with a log_history"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path: Path, files: dict[str, str], told: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ReportError) as refused:
        read_run(tmp_path)
    assert told in str(refused.value)
    assert str(tmp_path) in str(refused.value)
