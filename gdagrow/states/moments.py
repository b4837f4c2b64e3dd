"""Optimizer moments in a growth: which kinds there are, and what becomes of those of each parameter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gdagrow.axes import IndexMap
from gdagrow.choices import Moments, Schedule
from gdagrow.errors import CheckpointError
from gdagrow.growth import TensorGrowth
from gdagrow.plan import GrowthPlan, TensorPlan
from gdagrow.rows import told_by_row
from gdagrow.views import Origin, origin_of

# Where transformers' Trainer keeps them, and the state of its learning-rate schedule.
OPTIMIZER_FILE: Final = "optimizer.pt"
SCHEDULER_FILE: Final = "scheduler.pt"

# What torch's optimizers keep for each weight, and the power of a parameter's copies that it is divided by: a gradient
# is divided by the copies of what its parameter writes (growth-math 2), means of gradients are like them, means of
# their squares (and the largest of those, in AMSGrad) go by the square.
POWERS: Final[Mapping[str, int]] = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}


@dataclass(frozen=True)
class ParameterMoments:
    """What becomes of the moments of one grown parameter.

    name: The grown parameter.
    parameter: Its row of the architecture's table.
    source: The stored parameter whose moments are grown, None if there is none.
    growth: From those moments as they are stored to the grown ones.
    factor: What a gradient is multiplied by besides, because the parameter was divided by it.
    reset: Why they begin at zero instead, with the step count of their bias correction; None where they are carried.
    """

    name: str
    parameter: str
    source: str | None
    growth: TensorGrowth
    factor: float
    reset: str | None

    @property
    def begins(self) -> bool:
        """Whether they begin at zero, or those of fresh features among them do beside a step count that is carried."""
        return self.reset is not None or any(dim.num_fresh for dim in self.growth.dims)


def require_optimizer(directory: Path, file: str = OPTIMIZER_FILE) -> None:
    """Raise CheckpointError if a checkpoint without `file` has a schedule, which no engine would restore alone."""
    if (directory / SCHEDULER_FILE).exists():
        raise CheckpointError(
            f"{directory} has {SCHEDULER_FILE} and no {file}: a run that goes on from it would lose its schedule; "
            f"bring {file} back, or take the model alone with gdagrow export"
        )


def plan_moments(plan: GrowthPlan, policy: Moments) -> dict[str, ParameterMoments]:
    """What becomes of every grown parameter's moments, by name and in the order of `named_parameters()`."""
    found = {}
    for tensor in plan.tensors:
        origin = origin_of(plan.header, tensor.source.name)
        found[tensor.name] = ParameterMoments(
            tensor.name, tensor.parameter, origin.name, _from_stored(tensor.growth, origin.rows), 1 / origin.factor,
            _reset(tensor, origin, policy),
        )  # fmt: skip
    return found


def _reset(tensor: TensorPlan, origin: Origin, policy: Moments) -> str | None:
    if policy is Moments.reset:
        return "asked for"
    # What is made has no moments of its own to carry.
    exempt = policy is Moments.carry and origin.anew is None
    return None if exempt else tensor.moments_lost


def _from_stored(growth: TensorGrowth, rows: IndexMap | None) -> TensorGrowth:
    """The growth of a tensor whose rows a view puts in another order than they are stored in."""
    if rows is None:
        return growth
    stored = list(rows)
    first = IndexMap.of([stored[row] for row in growth.dims[0]], rows.old_size)
    return replace(growth, dims=(first, *growth.dims[1:]))


def moments_record(
    moments: Mapping[str, ParameterMoments], policy: Moments, schedule: Schedule, beta2: float | None
) -> dict[str, Any]:
    """What `growth.json` says of a training state that was grown; `beta2` is None for an optimizer without it."""
    reset = told_by_row((found.parameter, found.reset) for found in moments.values())
    carried = {"steps": 0, "because": "all moments are carried"}
    return {
        "optimizer": {"moments": policy.value, "schedule": schedule.value, "reset": reset},
        "warm_up": warm_up(beta2) if any(found.begins for found in moments.values()) else carried,
    }


def warm_up(beta2: float | None) -> dict[str, Any]:
    """The proposed linear warm-up where second moments begin at zero, for Adam's `beta2`, None where there are none.

    Source: Ma and Yarats, On the adequacy of untuned warmup for adaptive optimization (arXiv:1910.04209).
    """
    if beta2 is None or not 0 <= beta2 < 1:
        return {"steps": 0, "because": "no beta2 was found, so no second moments that a warm-up would wait for"}
    return {"steps": round(2 / (1 - beta2)), "because": f"moments begin at zero: 2 / (1 - {beta2:g})"}
