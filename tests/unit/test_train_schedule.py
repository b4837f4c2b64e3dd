"""The learning rate by step: warm-up, the way down, and a schedule that begins anew at a growth."""

import pytest

from gdagrow.train.recipe import Schedule, make_train_recipe
from gdagrow.train.schedule import learning_rate_factor, scheduled
from tests.trainings import recipe


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.7 + 0.3 * 0.5**0.5, 0.7, 0.7 - 0.3 * 0.5**0.5, 0.4]),
    ],
)
def test_up_and_down(kind: str, expected: list[float]) -> None:
    schedule = Schedule.model_validate({"kind": kind, "warm_up": 4, "final": 0.4})
    assert [scheduled(schedule, step, 9) for step in range(9)] == pytest.approx(expected, rel=1e-15)


def test_a_growth_goes_on_or_begins_anew() -> None:
    growth = {"at": 6, "expand": {"signal": 2}}
    kept = make_train_recipe(recipe(growth=[growth]), "r")
    anew = make_train_recipe(recipe(growth=[{**growth, "schedule": "restart"}]), "r")
    factors = [[learning_rate_factor(made, step) for step in range(12)] for made in (kept, anew)]
    assert factors[0][:6] == factors[1][:6]
    assert factors[1][6:] == [scheduled(anew.schedule, step, 6) for step in range(6)]
    assert factors[0][6:] == [scheduled(kept.schedule, step, 12) for step in range(6, 12)]
