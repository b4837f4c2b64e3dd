"""The state of one torch optimizer, as `optimizer.pt` holds it: read without reading a moment, and named.

The file numbers parameters by their place in the optimizer's groups, each in the order of `named_parameters()`. Names
are found again from the sizes of the groups and checked against every shape: an engine checks none, and moments of the
wrong shape corrupt memory in a fused optimizer.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gdagrow.archs import trained_of
from gdagrow.errors import CheckpointError
from gdagrow.formats.links import require_inside
from gdagrow.formats.torch_file import read_torch_file
from gdagrow.header import Header, TensorInfo
from gdagrow.rows import GROWABLE_DTYPES, claim
from gdagrow.states.moments import OPTIMIZER_FILE, POWERS

# How engines deal parameters out to groups: the group of a parameter from its name and its number of dimensions, None
# for one that the optimizer does not have. The first is transformers' own, from names alone.
_NO_DECAY: Final = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
# What engines put into a parameter's name: data parallel, torch.compile.
_WRAPPERS: Final = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
Grouping = Callable[[str, int], int | None]
_GROUPINGS: Final[Sequence[Grouping]] = (
    lambda name, dims: int(bool(_NO_DECAY.search(name))),
    lambda name, dims: int(bool(_NO_DECAY.search(name)) or ".subln." in name),  # every norm known by its type
    lambda name, dims: int(dims < 2),
    lambda name, dims: 0,
    lambda name, dims: 0 if dims == 2 else None,
    lambda name, dims: 0 if dims == 2 and ".layers." in name else None,  # Muon's: without embedding and head
)


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps of a run, by the names of its parameters.

    path: The file.
    tree: `optimizer.pt`, with a `TensorInfo` for every tensor.
    groups: The names of each group's parameters, in order.
    group_of: The group of a parameter that a growth adds, from its name and its number of dimensions.
    """

    path: Path
    tree: Mapping[str, Any]
    groups: tuple[tuple[str, ...], ...]
    group_of: Grouping

    @property
    def by_name(self) -> dict[str, Mapping[str, Any]]:
        """What the optimizer keeps for each of its parameters; empty where it keeps nothing yet."""
        names = (name for group in self.groups for name in group)
        numbers = (number for group in self.tree["param_groups"] for number in group["params"])
        return {name: self.tree["state"].get(number, {}) for name, number in zip(names, numbers, strict=True)}


def read_optimizer(header: Header, *, check_moments: bool = True) -> OptimizerState:
    """Read `optimizer.pt` beside the weights of a checkpoint, without reading a moment.

    Args:
        header: The checkpoint, as it is stored.
        check_moments: Whether all that there is must be moments that can be grown.

    Raises:
        CheckpointError: it cannot be read, or is of another model or run.
    """
    path = header.directory / OPTIMIZER_FILE
    tree = read_torch_file(require_inside(header.directory, path))
    _require_optimizer(path, tree)
    architecture = trained_of(header.config)
    # In the order of `named_parameters()`, which the table has and the files need not.
    names = claim(header, architecture, architecture.sizes(header.config))
    state = _named(path, tree, {name: header.tensors[name] for name in names})
    if check_moments:
        _require_moments(state)
    return state


def _require_optimizer(path: Path, tree: Any) -> None:
    try:
        numbers = [number for group in tree["param_groups"] for number in group["params"]]
        right = all(isinstance(kept, dict) for kept in tree["state"].values()) and tree["state"].keys() <= set(numbers)
        right = right and len(set(numbers)) == len(numbers) > 0 and all(type(number) is int for number in numbers)
    except (TypeError, KeyError, AttributeError):
        right = False
    if not right:
        raise CheckpointError(
            f"{path}: expected the state_dict of one torch optimizer (state, param_groups), got something else; "
            "restore the file"
        )


def _named(path: Path, tree: Mapping[str, Any], parameters: Mapping[str, TensorInfo]) -> OptimizerState:
    sizes = [len(group["params"]) for group in tree["param_groups"]]
    candidates = list(_candidates(path, tree, parameters))
    fitting = [state for state in candidates if [len(group) for group in state.groups] == sizes]
    for state in fitting:
        if not _misshapen(state, parameters):
            return state
    if fitting:
        raise CheckpointError(
            f"{path} does not belong to the weights beside it: {'; '.join(_misshapen(fitting[0], parameters))}; an "
            f"engine would not notice and corrupt memory: bring back the {OPTIMIZER_FILE} of this run and step"
        )
    known = dict.fromkeys(" + ".join(str(len(group)) for group in state.groups) for state in candidates)
    raise CheckpointError(
        f"{path} has {' + '.join(map(str, sizes))} parameters in its groups, expected {' or '.join(known)} for the "
        "weights beside it: it is of another model, or some parameters were frozen or dealt out in another way; take "
        "the model alone with gdagrow export"
    )


def _candidates(path: Path, tree: Mapping[str, Any], parameters: Mapping[str, TensorInfo]) -> Iterator[OptimizerState]:
    """The ways in which parameters may be dealt out: as the groups themselves say, in their order, if they do."""
    told = [group.get("param_names") for group in tree["param_groups"]]
    if all(isinstance(names, list) for names in told):
        bare = [[_WRAPPERS.sub("", str(name)) for name in names] for names in told]
        groups = tuple(tuple(name for name in dict.fromkeys(names) if name in parameters) for names in bare)
        group_of = {name: number for number, names in enumerate(groups) for name in names}
        yield OptimizerState(path, tree, groups, lambda name, dims: group_of.get(name))
        return
    for grouping in _GROUPINGS:
        if state := _dealt(path, tree, parameters, grouping):
            yield state


def _dealt(
    path: Path, tree: Mapping[str, Any], parameters: Mapping[str, TensorInfo], grouping: Grouping
) -> OptimizerState | None:
    groups: list[list[str]] = [[] for _ in tree["param_groups"]]
    for name, info in parameters.items():
        number = grouping(name, len(info.shape))
        if number is not None:
            if number >= len(groups):
                return None
            groups[number].append(name)
    return OptimizerState(path, tree, tuple(map(tuple, groups)), grouping)


def _misshapen(state: OptimizerState, parameters: Mapping[str, TensorInfo]) -> list[str]:
    return [
        f"{key} of {name} has shape {list(leaf.shape)}, the weight {list(parameters[name].shape)}"
        for name, kept in state.by_name.items()
        for key, leaf in kept.items()
        if key in POWERS and isinstance(leaf, TensorInfo) and leaf.shape != parameters[name].shape
    ]


def _require_moments(state: OptimizerState) -> None:
    problems, by_name = [], state.by_name
    if not any(by_name.values()) and all(group.get("momentum") == 0 for group in state.tree["param_groups"]):
        return  # SGD without momentum keeps nothing
    # What an optimizer keeps, it keeps for all parameters of a group.
    expected = {name: {key for each in group for key in by_name[each]} for group in state.groups for name in group}
    if not any(by_name.values()):
        problems.append("no parameter has any")
    for name, kept in by_name.items():
        if kept:  # not of one that was frozen so far, or that a growth added: an optimizer makes it when it needs it
            problems += [f"{name} has no {key}" for key in sorted(expected[name] - kept.keys())]
        for key, leaf in kept.items():
            if key not in POWERS:
                if not _is_number(leaf):
                    problems.append(f"{key} of {name} is none of {', '.join(POWERS)}")
            elif leaf is None:
                continue  # SGD's without momentum
            elif not isinstance(leaf, TensorInfo):
                problems.append(f"{key} of {name} is no tensor")
            elif leaf.dtype not in GROWABLE_DTYPES:
                problems.append(f"{key} of {name} is stored as {leaf.dtype}")
    if problems:
        raise CheckpointError(
            f"{state.path}: moments cannot be carried: {'; '.join(problems)}; begin them all at zero with --moments "
            "reset"
        )


def _is_number(leaf: Any) -> bool:
    return leaf.num_elements == 1 if isinstance(leaf, TensorInfo) else isinstance(leaf, str | int | float | None)
