"""`metrics.jsonl`: one JSON object a line, appended; a run that goes on first drops what lies after its state."""

import json
import math
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from gdagrow.errors import TrainError
from gdagrow.train.run_directory import replace_file

# The `event` of a line that tells of a growth, or of the model's health.
GROWTH: Final = "growth"
HEALTH: Final = "health"


class MetricsFile:
    """The figures and events of a run on the disk.

    Args:
        path: The file; its directory exists.
        step: The run goes on after this step. What was written later is dropped, the growth of that step included: a
            run that goes on from the grown state writes it again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        earlier = (line for line in metrics_lines(path) if line["step"] <= step)
        kept = takewhile(lambda line: not _is_growth(line, step), earlier)
        replace_file(path, "".join(map(_as_line, kept)))

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, which has a `step`.

        Raises:
            TrainError: the file cannot be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_as_line(line))
        except OSError as error:
            raise TrainError(f"{self._path} cannot be written ({error.strerror}); free some space") from None


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's file; none if it is not there."""
    if not path.exists():
        return []
    whole = []
    for raw in path.read_bytes().splitlines():
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            break  # cut short when the run was killed
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        whole.append(line)
    return whole


def _is_growth(line: Mapping[str, Any], step: int) -> bool:
    return bool(line["step"] == step and line.get("event") == GROWTH)


def _as_line(line: Mapping[str, Any]) -> str:
    return json.dumps({key: _number(value) for key, value in line.items()}) + "\n"


def _number(value: Any) -> Any:
    """JSON has no infinity: null stands for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
