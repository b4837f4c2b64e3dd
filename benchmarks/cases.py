"""A benchmark is a list of cases; a case runs its arms in turn, so that each round compares them under one weather."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By name of what was measured: seconds, MiB, bytes.
Figures = dict[str, float]
_LOOK = 0.5  # seconds
# Of all cores: more than that was done by others before a case began.
BUSY = 0.1


@dataclass(frozen=True)
class Case:
    """What was compared: `rounds` has the figures of every arm, in the order in which they ran."""

    name: str
    facts: Mapping[str, Any]
    rounds: list[dict[str, Figures]]
    busy_before: float


@dataclass(frozen=True)
class Settings:
    """How to run: `work` is where files go, `rounds` None for as many as a benchmark wants."""

    work: Path
    quick: bool = False
    rounds: int | None = None
    only: str = ""

    def num_rounds(self, wanted: int) -> int:
        return self.rounds or (1 if self.quick else wanted)


Benchmark = Callable[[Settings], Iterator[Case]]


def compare(name: str, facts: Mapping[str, Any], arms: Mapping[str, Callable[[], Figures]], rounds: int) -> Case:
    """Run every arm once in each round, beginning with another one each time."""
    busy, found, order = _busy(), [], list(arms)
    for _ in range(rounds):
        found.append({arm: arms[arm]() for arm in order})
        order = [*order[1:], order[0]]
    return Case(name, facts, found, round(busy, 3))


def _busy() -> float:
    """How much of all cores other programs take now, 0 to 1."""
    before = _jiffies()
    time.sleep(_LOOK)
    total, idle = (after - earlier for after, earlier in zip(_jiffies(), before, strict=True))
    return 1 - idle / total if total else 0.0


def _jiffies() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(fields[:8]), fields[3] + fields[4]  # idle and waiting for a disk
