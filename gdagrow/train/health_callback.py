"""The health of a model that is being trained, measured by a callback of any Trainer of `transformers`."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from gdagrow.record import RECORD_FILE
from gdagrow.train.copies import CopyFigures
from gdagrow.train.health import LOSS_WINDOW, PARTING_STEPS, HealthFigures, HealthMeter, loss_figures, warnings
from gdagrow.train.metrics import HEALTH


class HealthCallback(TrainerCallback):
    """Measures copies, lambdas, the noise path's gradients and the loss every so many steps, and warns.

    Args:
        every: Steps between two looks.
        write: Takes each line: see `health_line`.
        checkpoint: The directory of the model's `growth.json`, or None if it was not grown.
        at_step: The step after which the growth was.
    """

    def __init__(
        self, every: int, write: Callable[[Mapping[str, Any]], None], checkpoint: str | Path | None = None,
        at_step: int = 0,
    ) -> None:  # fmt: skip
        record = None if checkpoint is None else Path(checkpoint) / RECORD_FILE
        self._record = record if record is not None and record.exists() else None
        self._every, self._write, self._at_step = every, write, at_step
        self._meter: HealthMeter | None = None
        self._first: HealthFigures | None = None
        self._history: deque[HealthFigures] = deque(maxlen=PARTING_STEPS // every + 2)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Learn the model's layout."""
        self._meter = HealthMeter(given["model"].config.to_dict(), self._record)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure, where the gradients are."""
        step = state.global_step + 1
        if step % self._every:
            return
        assert self._meter is not None
        grown_at = self._at_step if self._record else None
        losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        figures = self._meter.measure(
            given["model"],
            step=step,
            since_growth=None if grown_at is None else step - grown_at,
            loss=loss_figures(losses[-2 * LOSS_WINDOW :], grown_at=grown_at or None),
        )
        self._first = self._first or figures
        # The first is what lambdas are held against, the others what copies are.
        history = [self._first, *(earlier for earlier in self._history if earlier is not self._first)]
        self._write(health_line(figures, warnings(figures, history if self._history else [])))
        self._history.append(figures)


def health_line(figures: HealthFigures, told: list[str]) -> dict[str, Any]:
    """Figures in short, for JSON.

    Returns:
        `step`, `event`, `warnings`, and where the model has them: `copies`, by axis the mean `cosine` and
        `relative_distance` of those that growth made equal (or, where there are none, of split parts); `lambda` and the
        gradients of the noise path relative to the signal path's (`noise_queries`, `noise_keys`) as lists over the
        layers; and as numbers to draw, `copy_distance`, `largest_lambda` and `smallest_noise_share`.
    """
    line: dict[str, Any] = {"step": figures.step, "event": HEALTH, "warnings": told}
    if copies := _by_axis(figures.copies):
        line["copies"] = copies
        line["copy_distance"] = fmean(of_axis["relative_distance"] for of_axis in copies.values())
    line["lambda"] = list(figures.lambdas.values())
    line["largest_lambda"] = max(figures.lambdas.values(), key=abs)
    shares = {"noise_queries": figures.noise_queries, "noise_keys": figures.noise_keys}
    line |= {key: list(of_layers.values()) for key, of_layers in shares.items()}
    if found := [*figures.noise_queries.values(), *figures.noise_keys.values()]:
        line["smallest_noise_share"] = min(found)
    return line


def _by_axis(copies: tuple[CopyFigures, ...]) -> dict[str, dict[str, float]]:
    chosen: dict[str, list[CopyFigures]] = {}
    for axis in dict.fromkeys(found.axis for found in copies):
        of_axis = [found for found in copies if found.axis == axis]
        chosen[axis] = [found for found in of_axis if found.written] or of_axis
    return {
        axis: {
            "cosine": fmean(found.cosine for found in of_axis),
            "relative_distance": fmean(found.relative_distance for found in of_axis),
        }
        for axis, of_axis in chosen.items()
    }
