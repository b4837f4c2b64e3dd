"""The learning rate as a function of the step alone, so that it is the same whenever and wherever a run is resumed."""

from math import cos, pi

from gdagrow.train.rates import warm_up_factor
from gdagrow.train.recipe import Schedule, TrainRecipe


def learning_rate_factor(recipe: TrainRecipe, step: int) -> float:
    """What the peak learning rate is multiplied by in the update that follows `step` updates.

    A growth whose `schedule` is `restart` begins the schedule anew, over the steps that are left.
    """
    begun = [growth.at for growth in recipe.growth if growth.schedule == "restart" and growth.at <= step]
    begin = max(begun, default=0)
    return scheduled(recipe.schedule, step - begin, recipe.steps - begin)


def scheduled(schedule: Schedule, step: int, steps: int) -> float:
    """The factor after `step` of `steps` updates: 1 at the end of the warm-up, `final` after the last but one."""
    if step < schedule.warm_up:
        return warm_up_factor(step, schedule.warm_up)
    if schedule.kind == "constant":
        return 1.0
    begin = schedule.warm_up if schedule.decay is None else max(schedule.warm_up, steps - 1 - schedule.decay)
    done = min(1.0, max(0, step - begin) / max(1, steps - 1 - begin))
    down = (1 + cos(pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return schedule.final + (1 - schedule.final) * down
