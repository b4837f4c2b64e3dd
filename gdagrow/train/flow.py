"""The course of a run between the Trainer's steps: its figures, its states, and where it stops to grow."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from gdagrow.errors import DivergedError
from gdagrow.train.recipe import TrainRecipe

Line = Mapping[str, Any]


class RunCallback(TrainerCallback):
    """Writes the figures of a run, logs whenever a state is saved, and stops where the run is to grow.

    Args:
        recipe: The run.
        stop_at: The step after which to stop, a state saved.
        write: Takes each line of figures.
        tick: Takes each step that is done.
    """

    def __init__(
        self, recipe: TrainRecipe, stop_at: int, write: Callable[[Line], None], tick: Callable[[int], None]
    ) -> None:
        self._recipe, self._stop_at, self._write, self._tick = recipe, stop_at, write, tick
        self._logged_step, self._logged_at = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the recipe's intervals, where a state that was loaded brought its own."""
        state.compute_steps(args, state.max_steps)
        self._logged_step, self._logged_at = state.global_step, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, and log whatever is saved."""
        if state.global_step == self._stop_at:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = self._recipe.evaluates
        # A state must not lie between two lines of the log: the mean loss since the last one is not in it.
        control.should_log |= control.should_save
        self._tick(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line of metrics.jsonl."""
        if "loss" in logs:
            self._write_step(state.global_step, logs)
        elif "eval_loss" in logs:
            _require_finite(state.global_step, "held-out loss", logs["eval_loss"])
            self._write({"step": state.global_step, "eval_loss": logs["eval_loss"]})

    def _write_step(self, step: int, logs: Line) -> None:
        _require_finite(step, "loss", logs["loss"])
        now, tokens = time.monotonic(), self._recipe.batch_size * self._recipe.context_length
        self._write({
            "step": step, "loss": logs["loss"], "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"],
            "tokens": step * tokens, "tokens_per_second": (step - self._logged_step) * tokens / (now - self._logged_at),
        })  # fmt: skip
        self._logged_step, self._logged_at = step, now


def _require_finite(step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"step {step}: the {what} is {value}; go on from the last state with a lower learning rate (--resume)"
        )
