"""What a grown model asks of a run, as callbacks for any Trainer of `transformers`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from transformers import TrainerCallback

from gdagrow.errors import TrainError
from gdagrow.record import RECORD_FILE, read_record
from gdagrow.train.configs import config_in
from gdagrow.train.freeze import Frozen, blocks, freeze, old_heads, old_layers
from gdagrow.train.rates import multipliers_of, scaled_rates
from gdagrow.train.sharded import unwrapped

_TRAINER_STATE: Final = "trainer_state.json"


class GrowthCallback(TrainerCallback):
    """The learning rates that a grown checkpoint's `growth.json` suggests: multipliers, and a warm-up after the growth.

        trainer.add_callback(GrowthCallback("checkpoint-1000-signal-x2"))

    Args:
        checkpoint: The grown checkpoint's directory.
        multipliers: Whether to apply the learning-rate multipliers.
        warm_up: Steps in which the rate comes up from 0 after the growth; `auto` as `growth.json` proposes.
        at_step: The step after which the growth was; by default that of the checkpoint's `trainer_state.json`, or 0.

    Raises:
        CheckpointError: there is no `growth.json`, or it cannot be read.
    """

    def __init__(
        self, checkpoint: str | Path, *, multipliers: bool = True, warm_up: int | Literal["auto"] = "auto",
        at_step: int | None = None,
    ) -> None:  # fmt: skip
        directory = Path(checkpoint)
        self._records = read_record(directory)
        if not self._records:
            raise TrainError(f"{directory} has no {RECORD_FILE}, which has the learning rates of a grown model")
        self._multipliers = multipliers
        self._warm_up = _proposed(self._records[-1]) if warm_up == "auto" else warm_up
        self._at_step = _step_of(directory) if at_step is None else at_step
        self._rates: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Scale the rates of the Trainer's optimizer."""
        multipliers = {}
        if self._multipliers:
            parameters = dict(given["model"].named_parameters())
            by_name = multipliers_of(self._records, list(parameters))
            multipliers = {parameters[name]: value for name, value in by_name.items() if value != 1}
        done = max(0, state.global_step - self._at_step)
        self._rates = scaled_rates(
            unwrapped(given["optimizer"]), multipliers, warm_up_steps=self._warm_up, steps_done=done
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Leave the optimizer as it was."""
        self._rates.remove()


class FreezeCallback(TrainerCallback):
    """Old heads or whole blocks kept exactly as they are for some steps.

    Args:
        steps: How many.
        layers: Blocks by index.
        old_heads_of: The directory of a grown checkpoint, to keep the first copy of every head that its last growth
            cloned.
        old_layers_of: The directory of a grown checkpoint, to keep all blocks but those that its last growth added.
        at_step: The step after which they begin.
    """

    def __init__(
        self, steps: int, *, layers: Sequence[int] = (), old_heads_of: str | Path | None = None,
        old_layers_of: str | Path | None = None, at_step: int = 0,
    ) -> None:  # fmt: skip
        self._layers = tuple(layers)
        self._of_heads = None if old_heads_of is None else Path(old_heads_of)
        self._of_layers = None if old_layers_of is None else Path(old_layers_of)
        self._end = at_step + steps
        self._freezer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin to keep them, if there are steps left."""
        left = self._end - state.global_step
        if left < 1:
            return
        names, frozen = [name for name, _ in given["model"].named_parameters()], Frozen()
        layers = [*self._layers]
        if self._of_heads is not None:
            frozen |= old_heads(config_in(self._of_heads), self._of_heads, names)
        if self._of_layers is not None:
            layers += old_layers(config_in(self._of_layers), self._of_layers)
        frozen |= blocks(names, layers)
        self._freezer = freeze(unwrapped(given["optimizer"]), given["model"], frozen, num_steps=left)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Leave the optimizer as it was."""
        if self._freezer is not None:
            self._freezer.remove()


def _proposed(record: Any) -> int:
    found = record.get("warm_up", {"steps": 0})
    steps = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise TrainError(f"{RECORD_FILE}: expected warm_up to have a number of steps, got {found!r}; restore the file")
    return steps


def _step_of(directory: Path) -> int:
    path = directory / _TRAINER_STATE
    if not path.exists():
        return 0
    try:
        return int(json.loads(path.read_bytes())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainError(f"{path} cannot be read; restore it, or give at_step") from None
