"""Learning rates after growth: multipliers and a warm-up on any torch optimizer, which its checkpoints do not show.

An optimizer knows learning rates by groups, and its checkpoints, its scheduler and other engines number parameters by
these groups: new groups would make every one of them another. So the groups are cut up by multiplier just before each
step and put back right after it.
"""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite, prod
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gdagrow.errors import CheckpointError, GdagrowError
from gdagrow.train.parameters import row_of


def multipliers_of(records: Sequence[Mapping[str, Any]], names: Collection[str]) -> dict[str, float]:
    """The learning-rate multipliers of a grown model's parameters, for all its growths together.

    A multiplier belongs to a weight as it is split now: after two growths that halved it, it is a quarter of what the
    learning rate was chosen for, while an optimizer's step is as large as ever. So those of successive growths
    multiply, and a parameter that an earlier growth did not have yet counts 1 in it. They are for optimizers of the
    Adam family, whose step does not shrink with the gradient (growth-math 3.10); under SGD rows in two copies take
    twice the rate besides.

    Args:
        records: The growths, oldest first, as `gdagrow.record.read_record` reads them from `growth.json`.
        names: The names of the parameters as the model has them; `_orig_mod.`, `module.` and the like are looked
            through.

    Returns:
        A multiplier for every one of `names`.

    Raises:
        CheckpointError: a record has no multipliers, or the last one none for some of the names; says which.
    """
    tables = [_multipliers(record) for record in records]
    found, unknown = {}, []
    for name in names:
        places = [row_of(name, table) for table in tables]
        factors = [place and table[place[0]] for place, table in zip(places, tables, strict=True)]
        if factors and factors[-1] is None:
            unknown.append(name)
        found[name] = prod((factor for factor in factors if factor is not None), start=1.0)
    if unknown:
        raise CheckpointError(
            f"growth.json has no learning-rate multiplier for {', '.join(unknown)}; give the parameters of the model "
            "that was grown, under the names of its checkpoint"
        )
    return found


def _multipliers(record: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {row: _positive(value) for row, value in record["learning_rate_multipliers"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise CheckpointError(
            "growth.json: expected learning_rate_multipliers, a number above 0 for each parameter, got something else; "
            "restore the file"
        ) from None


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not isfinite(value):
        raise ValueError(value)
    return float(value)


def warm_up_factor(step: int, num_steps: int) -> float:
    """What to multiply the learning rate by in a step of a linear warm-up, for `LambdaLR` and the like.

    Args:
        step: Steps taken since the warm-up began; 0 for the first, which then goes `1/num_steps` of the way.
        num_steps: Steps of the warm-up; 0 for none.
    """
    return min(1.0, (step + 1) / num_steps) if num_steps else 1.0


_Groups = list[dict[str, Any]]


class ScaledRates:
    """Multipliers and a warm-up at work on an optimizer, until `remove`; made by `scaled_rates`."""

    def __init__(
        self, optimizer: Optimizer, multipliers: Mapping[nn.Parameter, float], warm_up_steps: int, steps_done: int
    ) -> None:
        self.steps_done = steps_done
        self._warm_up_steps = warm_up_steps
        self._multipliers = {id(parameter): value for parameter, value in multipliers.items()}
        self._keep = tuple(multipliers)  # an id is a parameter's own only as long as the parameter lives
        self._whole: _Groups | None = None
        self._cut: list[tuple[dict[str, Any], dict[str, Any]]] = []  # each part of a group, beside the group
        # A step that raises never comes to its post hook; whatever looks at the groups next finds them whole again.
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(self._restore),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, _: self._restore(optimizer)),
        ]
        self._optimizer = optimizer

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._restore(self._optimizer)
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)
        self._whole = optimizer.param_groups
        factor = warm_up_factor(self.steps_done, self._warm_up_steps)
        self._cut = [(group, part) for group in self._whole for part in self._parts(group, factor)]
        optimizer.param_groups = [part for _, part in self._cut]

    def _parts(self, group: dict[str, Any], factor: float) -> _Groups:
        by_multiplier: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_multiplier.setdefault(self._multipliers.get(id(parameter), 1.0), []).append(parameter)
        parts = []
        for multiplier, parameters in by_multiplier.items():
            part = {**group, "params": parameters}
            if multiplier * factor != 1.0:
                part["lr"] = group["lr"] * (multiplier * factor)
            if multiplier != 1.0 and "weight_decay" in group:
                part["weight_decay"] = group["weight_decay"] / multiplier
            parts.append(part)
        return parts

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        changed = {
            key
            for group, part in self._cut
            for key, value in part.items()
            if key not in ("params", "lr", "weight_decay") and value is not group.get(key)
        }
        self._restore(optimizer)
        if changed:
            raise GdagrowError(
                f"{type(optimizer).__name__} keeps {', '.join(sorted(changed))} in its parameter groups, where scaled "
                "rates would lose it; train with one of torch's optimizers, or without multipliers"
            )
        self.steps_done += 1

    def _restore(self, optimizer: Optimizer) -> None:
        if self._whole is not None:
            optimizer.param_groups, self._whole = self._whole, None


def scaled_rates(
    optimizer: Optimizer,
    multipliers: Mapping[nn.Parameter, float] | None = None,
    *,
    warm_up_steps: int = 0,
    steps_done: int = 0,
) -> ScaledRates:
    """Multiply the learning rates of single parameters, and warm all of them up, in every step of an optimizer.

    Schedulers, `state_dict` and whatever else looks at `param_groups` between two steps see the optimizer's own groups
    and rates. Each step is bit for bit that of an optimizer with a group for each multiplier.

    Weight decay is divided by the multiplier, so that a step shrinks each weight by the same share as before: what
    tests/numerics/test_training_steps.py shows to be exact for SGD, AdamW and Muon. In the warm-up decay follows the
    learning rate, as under any schedule.

    Args:
        optimizer: One of torch's, or one that keeps nothing of its own in its groups; itself, not what an engine wraps
            around it (accelerate's has it as `.optimizer`). Call this once an engine has sharded the parameters and a
            resumed run has loaded its state: distributed checkpoints take a step to make room for what they load.
        multipliers: By parameter, above 0; a parameter that is missing has 1. To leave parameters as they are, see
            `gdagrow.train.freeze`.
        warm_up_steps: Steps of a linear warm-up from 0 to the full rate (see `warm_up_factor`); 0 for none.
        steps_done: How many of them were taken before, when a run is resumed.

    Returns:
        A handle, with `steps_done` counted on, and `remove`.

    Raises:
        GdagrowError: rates are scaled already, a multiplier is not above 0, or a parameter is not the optimizer's; and
            in a step, if the optimizer keeps something in its groups.
    """
    multipliers = multipliers or {}
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), ScaledRates) for hook in hooks):
        raise GdagrowError(
            "the learning rates of this optimizer are scaled already; remove that first, or give all multipliers "
            "at once"
        )
    wrong = sorted({value for value in multipliers.values() if not 0 < value < float("inf")})
    if wrong:
        raise GdagrowError(f"learning-rate multipliers: expected numbers above 0, got {', '.join(map(str, wrong))}")
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    strangers = [tuple(parameter.shape) for parameter in multipliers if id(parameter) not in known]
    if strangers:
        raise GdagrowError(
            f"learning-rate multipliers: {len(strangers)} parameters, the first of shape {list(strangers[0])}, are not "
            "in the optimizer; give those that it steps, after any engine has wrapped or sharded them"
        )
    return ScaledRates(optimizer, multipliers, warm_up_steps, steps_done)
