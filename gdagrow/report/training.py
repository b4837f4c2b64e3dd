"""Training curves, from what trainers leave beside a run: `trainer_state.json`, or `metrics.jsonl`."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from sys import float_info
from typing import Any, Final

from gdagrow.errors import ReportError
from gdagrow.formats.strict_json import parse_object

# Points of a curve that are kept: more than a page has pixels for.
MAX_POINTS: Final = 2000
_TRAINER_STATE, _METRICS = "trainer_state.json", "metrics.jsonl"
_OF_TRAINER_STATE: Final = ("loss", "eval_loss")
_MAX_LINE_BYTES: Final = 2**20


@dataclass(frozen=True)
class Curve:
    """One figure over the steps of a run.

    num_points: Points in the file, of which `steps` and `values` are at most the first of each of `MAX_POINTS` equal
        stretches, and the last.
    """

    metric: str
    num_points: int
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainingRun:
    """A run directory: its name, path, the file that was read, and what it has, `loss` first."""

    name: str
    directory: str
    file: str
    curves: tuple[Curve, ...]


def read_run(directory: Path) -> TrainingRun:
    """Read a run's curves; values that are not finite are left out.

    Args:
        directory: A Hugging Face `Trainer`'s output or checkpoint directory, or one with a `metrics.jsonl` of one JSON
            object a line with `step`, `loss` and any further numbers.

    Raises:
        ReportError: it is neither, or has no loss.
    """
    readers = {_TRAINER_STATE: _trainer_entries, _METRICS: _metrics_entries}
    file = next((name for name in readers if (directory / name).is_file()), None)
    if file is None:
        raise ReportError(
            f"{directory}: expected a training run, a directory with {_TRAINER_STATE} or {_METRICS}, and found neither"
        )
    points: dict[str, _Thinned] = {}
    try:
        for step, metrics in readers[file](directory / file):
            for metric, value in metrics.items():
                points.setdefault(metric, _Thinned()).add(step, value)
    except OSError as error:
        raise ReportError(f"{directory / file} cannot be read ({error.strerror}); give another run") from None
    if "loss" not in points:
        raise ReportError(f"{directory / file}: expected entries with a step and a loss, found none; give another run")
    curves = tuple(points[metric].curve(metric) for metric in sorted(points, key=_order))
    return TrainingRun(Path(os.path.abspath(directory)).name, str(directory), file, curves)


def _order(metric: str) -> tuple[int, str]:
    return (_OF_TRAINER_STATE.index(metric) if metric in _OF_TRAINER_STATE else len(_OF_TRAINER_STATE), metric)


class _Thinned:
    """Points in order, of which every n-th is kept; n doubles when there are too many."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, float]] = []
        self._last = (0.0, 0.0)
        self._count, self._every = 0, 1

    def add(self, step: float, value: float) -> None:
        self._last = step, value
        if self._count % self._every == 0:
            self._kept.append(self._last)
        self._count += 1
        if len(self._kept) == MAX_POINTS:
            self._kept, self._every = self._kept[::2], self._every * 2

    def curve(self, metric: str) -> Curve:
        kept = self._kept if self._kept[-1] == self._last else [*self._kept, self._last]
        steps, values = zip(*kept, strict=True)
        return Curve(metric, self._count, steps, values)


_Entries = Iterator[tuple[float, Mapping[str, float]]]


def _trainer_entries(path: Path) -> _Entries:
    try:
        log = parse_object(path.read_bytes(), str(path))["log_history"]
        entries = [(entry["step"], entry) for entry in log]
    except (ValueError, KeyError, TypeError):
        raise ReportError(
            f"{path}: expected a Trainer's state with a log_history of steps, got something else; give another run"
        ) from None
    for step, entry in entries:
        if _is_number(step):
            yield step, {metric: entry[metric] for metric in _OF_TRAINER_STATE if _is_number(entry.get(metric))}


def _metrics_entries(path: Path) -> _Entries:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            entry = _parsed(line)
            if not isinstance(entry, dict) or not _is_number(entry.get("step")):
                raise ReportError(
                    f"{path}, line {number}: expected a JSON object with a step, got something else; repair the file"
                )
            yield entry["step"], {key: value for key, value in entry.items() if key != "step" and _is_number(value)}


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    """Whether it is a number, and one that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max
