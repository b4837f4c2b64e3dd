"""The learning rate by step: warm-up, the way down, and a schedule that begins anew at a growth."""

import pytest

from gdagrow.errors import RecipeError
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


def test_the_last_steps_alone_go_down() -> None:
    schedule = Schedule.model_validate({"kind": "wsd", "warm_up": 2, "decay": 4, "final": 0.2})
    found = [scheduled(schedule, step, 10) for step in range(10)]
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rel=1e-15)
    assert [scheduled(schedule, step, 14) for step in range(10)] == [*found[:6], 1, 1, 1, 1]
    # A decay longer than the run begins after the warm-up.
    assert scheduled(schedule, 3, 4) == pytest.approx(0.2, rel=1e-15)


@pytest.mark.parametrize("wrong", [{"kind": "wsd"}, {"kind": "cosine", "decay": 3}, {"decay": 3}])
def test_a_decay_goes_with_its_kind(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="schedule: decay, in steps, goes with kind wsd and with no other"):
        make_train_recipe(recipe(schedule=wrong), "r")


def test_a_growth_goes_on_or_begins_anew() -> None:
    growth = {"at": 6, "expand": {"signal": 2}}
    kept = make_train_recipe(recipe(growth=[growth]), "r")
    anew = make_train_recipe(recipe(growth=[{**growth, "schedule": "restart"}]), "r")
    factors = [[learning_rate_factor(made, step) for step in range(12)] for made in (kept, anew)]
    assert factors[0][:6] == factors[1][:6]
    assert factors[1][6:] == [scheduled(anew.schedule, step, 6) for step in range(6)]
    assert factors[0][6:] == [scheduled(kept.schedule, step, 12) for step in range(6, 12)]
