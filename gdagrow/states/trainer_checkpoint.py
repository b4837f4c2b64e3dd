"""A checkpoint of transformers' Trainer: its whole training state beside grown weights, so that the run goes on."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gdagrow.choices import Moments, Schedule
from gdagrow.errors import CheckpointError
from gdagrow.formats.links import require_inside
from gdagrow.formats.small_file import read_small_file
from gdagrow.formats.torch_file import (
    TorchFileHeader,
    lay_out_torch_file,
    map_leaves,
    read_small,
    read_torch_file,
)
from gdagrow.header import TensorInfo
from gdagrow.output import GrownTensor, Output
from gdagrow.plan import GrowthPlan
from gdagrow.states.moments import (
    OPTIMIZER_FILE,
    POWERS,
    SCHEDULER_FILE,
    ParameterMoments,
    moments_record,
    plan_moments,
)
from gdagrow.states.optimizer_file import OptimizerState, read_optimizer

STATE_FILE: Final = "trainer_state.json"
_CARRIED: Final = re.compile(r"scheduler\.pt|scaler\.pt|trainer_state\.json|training_args\.bin|rng_state(_\d+)?\.pth")
_RESTARTED: Final = re.compile(r"scheduler\.pt|trainer_state\.json|rng_state(_\d+)?\.pth")
_NO_BEST: Final = dict.fromkeys(("best_metric", "best_global_step", "best_model_checkpoint"))
_MOMENTS = "moments"
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")
_NO_LAYER: Final = -1
NONE_YET: Final = "the run has none of it yet"


def trainer_output(plan: GrowthPlan, weights: Output, *, moments: Moments, schedule: Schedule) -> Output:
    """Add a Trainer checkpoint's training state to what is written of its weights.

    Raises:
        CheckpointError: `optimizer.pt` cannot be read, is of another model or run, or lacks moments to carry.
    """
    directory = plan.header.directory
    state = read_optimizer(plan.header.stored, check_moments=moments is not Moments.reset)
    planned = _without_what_is_not_there(state, plan_moments(plan, moments))
    tree, tensors, begun = _grown_tree(state, planned, {t.name: len(t.shape) for t in plan.tensors})
    if schedule is Schedule.restart:
        for group in tree["param_groups"]:
            # The first step moves nothing, as in every warm-up of transformers; then the new schedule sets the rate.
            group["lr"] = 0.0
    files, carried = files_of_state(directory, schedule)
    return replace(
        weights,
        layouts=(*weights.layouts, lay_out_torch_file(OPTIMIZER_FILE, tree)),
        tensors={**weights.tensors, **tensors},
        sources={**weights.sources, _MOMENTS: TorchFileHeader.of(state.path, state.tree)},
        files={**weights.files, **files},
        carried=carried,
        record=moments_record(planned, moments, schedule, _beta2(tree, begun)),
        hints=(*weights.hints, *_hints(directory, schedule)),
    )


def files_of_state(directory: Path, schedule: Schedule) -> tuple[dict[str, bytes], frozenset[str]]:
    """The files of a Trainer's checkpoint that say where a run is.

    Returns:
        The content of those that are another for the grown model, and the names of those that are the same for it.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    found = frozenset(path.name for path in directory.iterdir() if _CARRIED.fullmatch(path.name))
    if schedule is Schedule.restart:
        return _restarted(directory, found), frozenset(name for name in found if not _RESTARTED.fullmatch(name))
    files = _without_best(directory) if STATE_FILE in found else {}
    return files, found - files.keys()


def _without_best(directory: Path) -> dict[str, bytes]:
    """The record of a run, if it has a best model so far: that is of the source's sizes, and loaded at the end."""
    state = _trainer_state(directory)
    return {STATE_FILE: _json(state | _NO_BEST)} if any(state.get(key) is not None for key in _NO_BEST) else {}


def _json(state: Mapping[str, Any]) -> bytes:
    return (json.dumps(state, indent=2) + "\n").encode()


def _without_what_is_not_there(
    state: OptimizerState, planned: Mapping[str, ParameterMoments]
) -> dict[str, ParameterMoments]:
    """The moments of parameters that the run has not trained yet, such as blocks frozen since its start, begin."""
    kept = state.by_name
    yet = {name for name, of_name in kept.items() if not of_name} if any(kept.values()) else set()
    return {
        name: replace(found, reset=NONE_YET) if found.reset is None and found.source in yet else found
        for name, found in planned.items()
    }


def _grown_tree(
    state: OptimizerState, planned: Mapping[str, ParameterMoments], dims: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, GrownTensor], frozenset[int]]:
    """The grown `optimizer.pt`, with a `TargetTensor` for every moment, and what is streamed into those.

    Returns also the numbers of the parameters whose moments begin, or some of them.
    """
    kept, tensors, begun = state.by_name, dict[str, GrownTensor](), set[int]()
    known = {name: number for number, names in enumerate(state.groups) for name in names}
    dealt: list[list[str]] = [[] for _ in state.groups]
    for name, found in planned.items():
        number = state.group_of(name, dims[name]) if found.source is None else known.get(found.source)
        if number is not None:
            dealt[number].append(name)
    for names, stored in zip(dealt, state.groups, strict=True):
        _put_in_order(names, stored, planned)
    grown: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    count = 0
    for group, names in zip(state.tree["param_groups"], dealt, strict=True):
        numbers = list(range(count, count + len(names)))
        count += len(names)
        own = {"param_names": names} if "param_names" in group else {}
        groups.append({**_read_leaves(state, group), **own, "params": numbers})
        for number, name in zip(numbers, names, strict=True):
            found = planned[name]
            begun |= {number} if found.begins else set()
            # An optimizer makes what is left out when it first needs it: zeros, and a step count of zero.
            if found.reset is None and found.source is not None and kept.get(found.source):
                grown[number] = {key: _grown_leaf(state, found, key, leaf, tensors)
                                 for key, leaf in kept[found.source].items()}  # fmt: skip
    rest = {
        key: _read_leaves(state, value) for key, value in state.tree.items() if key not in ("state", "param_groups")
    }
    return {"state": grown, "param_groups": groups, **rest}, tensors, frozenset(begun)


def _put_in_order(names: list[str], stored: Sequence[str], planned: Mapping[str, ParameterMoments]) -> None:
    """Sort a group's parameters as their sources are `stored`, if that is no order of `named_parameters()`.

    A new block stands behind the one that it is a copy of, in front of it where blocks are stored last to first. One
    that has no source there stays behind the one that it follows.
    """
    known = {name: number for number, name in enumerate(stored)}
    in_order = [found.source for found in planned.values() if found.source in known]
    if list(stored) == list(dict.fromkeys(in_order)):
        return
    blocks = _blocks(stored)
    down = -1 if list(blocks) != sorted(blocks) else 1
    place = block = -1
    places: dict[str, tuple[int, int, int]] = {}
    for name in names:
        source = planned[name].source
        if source in known:
            place = known[source]
            block = blocks.get(_layer_of(source), place)
        places[name] = (block, down * _layer_of(name), place)
    names.sort(key=places.__getitem__)


def _blocks(names: Sequence[str]) -> dict[int, int]:
    """Where each block's parameters begin, if those of every block stand together; empty if not."""
    layers = [_layer_of(name) for name in names]
    first = {layer: layers.index(layer) for layer in dict.fromkeys(layers) if layer != _NO_LAYER}
    together = all(set(layers[at : at + layers.count(layer)]) == {layer} for layer, at in first.items())
    return first if together else {}


def _layer_of(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else _NO_LAYER


def _beta2(tree: Mapping[str, Any], begun: frozenset[int]) -> float | None:
    """How slowly Adam's second moments forget, in the groups where any begin at zero; None where there are none."""
    groups = (group for group in tree["param_groups"] if begun & set(group["params"]))
    pairs = [pair for group in groups if isinstance(pair := group.get("betas"), list | tuple) and len(pair) == 2]
    return max((float(beta2) for _, beta2 in pairs if isinstance(beta2, float | Tensor)), default=None)


def _grown_leaf(
    state: OptimizerState, found: ParameterMoments, key: str, leaf: Any, tensors: dict[str, GrownTensor]
) -> Any:
    if not isinstance(leaf, TensorInfo):
        return leaf
    if key not in POWERS:
        return read_small(state.path, leaf)
    power = POWERS[key]
    grown = GrownTensor(
        f"{found.name}/{key}", _MOMENTS, leaf.name, leaf.dtype, found.growth, power, found.factor**power
    )
    tensors[grown.name] = grown
    return grown.target


def _read_leaves(state: OptimizerState, tree: Any) -> Any:
    """A part of the tree with its tensors, which are single numbers such as a learning rate."""
    return map_leaves(tree, lambda _, leaf: read_small(state.path, leaf) if isinstance(leaf, TensorInfo) else leaf)


def _restarted(directory: Path, carried: frozenset[str]) -> dict[str, bytes]:
    """The files of a run at step 0: its rates, warm-up and length are those of whatever goes on from it."""
    files = {}
    if SCHEDULER_FILE in carried:
        path = directory / SCHEDULER_FILE
        tree = read_torch_file(require_inside(directory, path))
        if not isinstance(tree, dict) or "last_epoch" not in tree or "_schedulers" in tree:
            raise CheckpointError(
                f"{path}: expected the state of one schedule that counts steps, such as transformers' own, got "
                "something else; keep it with --schedule keep"
            )
        small = map_leaves(tree, lambda _, leaf: read_small(path, leaf) if isinstance(leaf, TensorInfo) else leaf)
        kept = {key: value for key, value in small.items() if key not in ("base_lrs", "_last_lr")}
        content = io.BytesIO()
        torch.save({**kept, "last_epoch": 0, "_step_count": 1}, content)
        files[SCHEDULER_FILE] = content.getvalue()
    if STATE_FILE in carried:
        state = _trainer_state(directory)
        # The record of the run so far is the source's; what else there is, such as the state of callbacks, stays.
        files[STATE_FILE] = _json(state | {"global_step": 0, "epoch": 0.0, "log_history": []} | _NO_BEST)
    return files


def _hints(directory: Path, schedule: Schedule) -> Iterator[str]:
    if not (directory / SCHEDULER_FILE).exists():
        yield f"there is no {SCHEDULER_FILE}, without which the Trainer restores no optimizer either"
    if schedule is Schedule.keep and (directory / STATE_FILE).exists():
        state = _trainer_state(directory)
        step, last = state.get("global_step"), state.get("max_steps")
        if isinstance(step, int) and isinstance(last, int) and 0 < last <= step:
            yield (
                f"the run is at step {step} of {last}: a Trainer that goes on from here does one more step and ends; "
                "give it more steps, or begin a new schedule with --schedule restart"
            )


def _trainer_state(directory: Path) -> dict[str, Any]:
    path = require_inside(directory, directory / STATE_FILE)
    try:
        state = json.loads(read_small_file(path))  # with a loss of NaN, as the Trainer writes it
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got something else; restore the file")
    return state
