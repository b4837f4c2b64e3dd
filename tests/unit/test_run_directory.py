"""What is in a run's directory: which states are whole, which one is the last, what is kept and what is removed."""

import json
from pathlib import Path

from gdagrow.train.metrics import MetricsFile
from gdagrow.train.run_directory import clear, keep_last, last_state, publish, saving_directory, states
from tests.trainings import names


def make_states(run: Path, *directories: str) -> None:
    for name in directories:
        (run / name).mkdir(parents=True)
        (run / name / "weights").write_text(name)


def test_states_in_order_a_grown_one_after_its_source(tmp_path: Path) -> None:
    make_states(tmp_path, "checkpoint-1000", "grown-200", "checkpoint-200", "checkpoint-30", "checkpoint-x", "grown-7b")
    make_states(tmp_path / ".saving", "checkpoint-2000")
    found = [state.directory.name for state in states(tmp_path)]
    assert found == ["checkpoint-30", "checkpoint-200", "grown-200", "checkpoint-1000"]
    last = last_state(tmp_path)
    assert last is not None
    assert last.step == 1000
    assert last_state(tmp_path / "none") is None


def test_only_the_last_states_are_kept(tmp_path: Path) -> None:
    make_states(tmp_path, "checkpoint-4", "checkpoint-8", "grown-8", "model")
    keep_last(tmp_path, 2)
    assert [state.directory.name for state in states(tmp_path)] == ["checkpoint-8", "grown-8"]
    assert (tmp_path / "model").is_dir()


def test_publishing_gives_a_state_its_name(tmp_path: Path) -> None:
    make_states(saving_directory(tmp_path), "checkpoint-4")
    assert states(tmp_path) == []
    publish(tmp_path, "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "weights").read_text() == "checkpoint-4"
    assert names(saving_directory(tmp_path)) == []


def test_restarting_removes_what_is_a_runs_and_nothing_else(tmp_path: Path) -> None:
    make_states(tmp_path, "checkpoint-4", "grown-4", "model", "tokens", ".saving", "mine")
    for name in ("recipe.yaml", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    clear(tmp_path)
    assert names(tmp_path) == ["mine", "notes.txt"]


def metrics_after(path: Path, step: int) -> list[str]:
    MetricsFile(path, step)
    return [f"{line['step']}{line.get('event', '')}" for line in map(json.loads, path.read_text().splitlines())]


def test_lines_after_the_state_are_dropped_and_with_them_the_growth_at_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = MetricsFile(path, 0)
    for line in ({"step": 4}, {"step": 4, "eval_loss": 1.0}, {"step": 4, "event": "growth"}, {"step": 4}, {"step": 8}):
        whole.write(line)
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    assert metrics_after(path, 8) == ["4", "4", "4growth", "4", "8"]
    assert metrics_after(path, 4) == ["4", "4"]
    assert metrics_after(path, 3) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write({"step": 1, "grad_norm": float("inf")})
    assert path.read_text() == '{"step": 1, "grad_norm": null}\n'
