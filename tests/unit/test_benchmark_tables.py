"""What the tables of benchmarks make of figures."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = {"output_bytes": 2e9, "files": 1, "python_anonymous": 6.0, "torch_anonymous": 66.0}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("tables")


def entry(*cases: dict[str, Any]) -> dict[str, Any]:
    return {"command": "python benchmarks x", "date": "2026-01-31", "cases": list(cases)}


def case(facts: dict[str, Any], *rounds: dict[str, dict[str, float]], busy: float = 0.0) -> dict[str, Any]:
    return {"name": "bf16, x2", "facts": facts, "rounds": list(rounds), "busy_before": busy}


def ran(wall: float, anonymous: float = 0.0) -> dict[str, float]:
    return {"wall": wall, "cpu": 3.0, "anonymous": anonymous}


def test_a_rate_is_held_against_the_baseline_of_its_own_round(tables: ModuleType) -> None:
    slow = {"exact": ran(4, 106), "noise": ran(8, 205), "dd": ran(8), "direct": ran(2), "cp": ran(4)}
    fast = {"exact": ran(2, 105), "noise": ran(4, 206), "dd": ran(2), "direct": ran(2), "cp": ran(4)}
    found = tables.table_of("expand", {"benchmarks": {"expand": entry(case(FACTS, slow, fast, busy=0.5))}})
    rows = found.splitlines()
    of_dd, of_direct, of_cp = "1.50 (1.00-2.00)", "0.75 (0.50-1.00)", "1.50 (1.00-2.00)"
    assert rows[2] == f"| bf16, x2 | 2.00 GB | exact | 0.67 | {of_dd} | {of_direct} | {of_cp} | 1.50 | 100, 40 MiB |"
    assert rows[3].startswith("|  |  | noise | 0.33 | 0.75 (0.50-1.00) |")
    assert rows[3].endswith("| 200, 140 MiB |")
    assert rows[-1] == (
        "`python benchmarks x`: 2 rounds on 2026-01-31. **The machine was not idle**: other programs took up to 50% of "
        "it before 1 of 1 case."
    )


def test_the_line_of_seconds_by_size(tables: ModuleType) -> None:
    cases = [
        case({**FACTS, "output_bytes": size * 1e9}, {"exact": ran(1 + size), "noise": ran(1 + 2 * size), "dd": ran(3)})
        for size in (0.5, 1, 10)
    ]
    assert tables.fit(cases, "noise") == pytest.approx((1, 2, 1))
    found = tables.table_of("sizes", {"benchmarks": {"sizes": entry(*cases)}})
    assert "exact takes 1.00 s and 1.00 s a GB (R² 1.0000); noise takes 1.00 s and 2.00 s a GB (R² 1.0000)." in found
    assert found.splitlines()[-1] == "`python benchmarks x`: 1 round on 2026-01-31."


def test_only_what_stands_between_its_marks_is_made_again(tables: ModuleType) -> None:
    (turn,) = case({}, {"python": ran(0.01), "--help": ran(0.2)})["rounds"]
    start = {arm: {**figures, "resident": 9.0} for arm, figures in turn.items()}
    results = {"benchmarks": {"start-up": entry(case({}, start))}}
    page = "before\n<!-- table start-up -->\nold\n<!-- end -->\nafter\n"
    again = tables.page_with_tables(page, results)
    assert again.startswith("before\n<!-- table start-up -->\n\n| command |")
    assert again.endswith("2026-01-31.\n\n<!-- end -->\nafter\n")
    assert "| `gdagrow --help` | 0.200 (0.200-0.200) | 0.190 | 3.000 | 9 MiB |" in again
    assert "old" not in again
    assert tables.page_with_tables(again, results) == again
    with pytest.raises(KeyError, match="expand"):
        tables.page_with_tables(page.replace("start-up", "expand"), results)
