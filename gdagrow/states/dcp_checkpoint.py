"""A torch distributed checkpoint and what a growth makes of it: weights and moments, tensor by tensor."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gdagrow.axes import IndexMap
from gdagrow.choices import Moments, Schedule
from gdagrow.dcp import DcpHeader, read_beside
from gdagrow.dcp_tensors import DcpTensors, require_tied
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.formats.dcp_layout import plan_dcp
from gdagrow.formats.dcp_metadata import METADATA_FILE, is_dcp
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.kind import SHARDED_OPTIMIZER, SHARDED_WEIGHTS
from gdagrow.formats.torch_file import load_plain
from gdagrow.growth import TensorGrowth
from gdagrow.header import Header, TensorInfo
from gdagrow.output import WEIGHTS, GrownTensor, Output, grown_weights
from gdagrow.plan import GrowthPlan
from gdagrow.rows import GROWABLE_DTYPES
from gdagrow.states.moments import (
    POWERS,
    ParameterMoments,
    moments_record,
    plan_moments,
    require_optimizer,
)
from gdagrow.states.trainer_checkpoint import files_of_state

STEP: Final = "step"
_STATE: Final = "state"

Entry = tuple[TargetTensor, GrownTensor]


def dcp_output(plan: GrowthPlan, *, moments: Moments, schedule: Schedule, max_file_bytes: int) -> Output:
    """All that a growth writes of a distributed checkpoint: the same state dicts, grown, for any number of ranks.

    Args:
        plan: The growth of what a `DcpHeader` has.
        moments: What becomes of optimizer moments.
        schedule: Only `keep`: what a schedule is called in a state dict is the engine's own affair.
        max_file_bytes: The largest file, unless a single tensor is larger.

    Raises:
        CheckpointError: moments do not fit their weights, or are of a kind that cannot be grown.
        PlanError: what is asked for would change values that are carried unread.
    """
    trees = read_trees(plan.header.stored)
    state = trees[-1]
    if state.moments:
        _require_possible(plan, schedule)
        if moments is not Moments.reset:
            _require_moments(plan.header.stored, state)
    planned = plan_moments(plan, moments)
    output, beta2 = Output((), {}, {}), None
    for tree in trees:
        grown, blobs = _grown_tree(plan, tree, planned, max_file_bytes)
        beta2 = _beta2(blobs) if tree is state else None
        output = replace(
            output,
            layouts=(*output.layouts, *grown.layouts),
            tensors={**output.tensors, **grown.tensors},
            sources={**output.sources, **grown.sources},
            files={**output.files, **grown.files},
        )
    files, carried = files_of_state(plan.header.directory, schedule) if state.place else ({}, frozenset())
    return replace(
        output,
        files={**output.files, **files},
        carried=carried,
        record=moments_record(planned, moments, schedule, beta2) if state.moments else {},
        hints=tuple(_hints(plan.header.directory)),
    )


def _hints(directory: Path) -> Iterator[str]:
    if directory.name == SHARDED_WEIGHTS and is_dcp(directory.parent / SHARDED_OPTIMIZER):
        yield f"only weights are in {directory}; give {directory.parent} to grow the optimizer beside them as well"


def read_trees(header: Header) -> tuple[DcpHeader, ...]:
    """The DCP directories of a checkpoint: one, or as transformers' Trainer has it the weights' and the optimizer's."""
    assert isinstance(header, DcpHeader), "a distributed checkpoint is grown as it is stored"
    if header.place != SHARDED_WEIGHTS:
        return (header,)
    if not is_dcp(header.directory / SHARDED_OPTIMIZER):
        require_optimizer(header.directory, SHARDED_OPTIMIZER)
        return (header,)
    return header, read_beside(header, SHARDED_OPTIMIZER)


def _grown_tree(
    plan: GrowthPlan, tree: DcpHeader, planned: Mapping[str, ParameterMoments], max_file_bytes: int
) -> tuple[Output, dict[str, bytes]]:
    """What is written of one DCP directory, and its values that are no tensors."""
    state = f"{_STATE}/{tree.place}"
    entries = [*_weights(plan, tree), *_moments(tree, planned, state), *_carried(tree, state)]
    with DcpTensors(tree) as reader:
        require_tied(tree, reader)
        blobs = {key: reader.blob(key) for key in tree.dcp.blobs}
    layout = plan_dcp([target for target, _ in entries], blobs, _paths(plan, tree), max_file_bytes)
    return Output(
        tuple(replace(file, file=tree.inside(file.file)) for file in layout.files),
        {target.name: grown for target, grown in entries},
        {state: tree, **({WEIGHTS: plan.header} if tree.names.weights else {})},
        {tree.inside(METADATA_FILE): layout.metadata},
    ), blobs


def _require_possible(plan: GrowthPlan, schedule: Schedule) -> None:
    if schedule is not Schedule.keep:
        raise PlanError(
            f"--schedule {schedule}: a distributed checkpoint's schedule has no name that all engines know; keep it, "
            "and have the engine leave it out when it loads (torchtitan: checkpoint.exclude_from_loading)"
        )
    new = [tensor.name for tensor in plan.tensors if tensor.name not in plan.header.stored.tensors]
    if new:
        asked = ["more layers"] * bool(plan.layers.new) + ["embeddings untie"] * (plan.tied_before != plan.tied_after)
        raise PlanError(
            f"{' and '.join(asked)}: {len(new)} parameters, the first {new[0]}, would be new to the optimizer in "
            f"{plan.header.directory}, whose groups are pickles that are carried unread; leave that out, or convert "
            "the weights alone to safetensors first"
        )


def _require_moments(weights: Header, state: DcpHeader) -> None:
    kinds: dict[str, set[str]] = {}
    problems = []
    for (name, kind), info in state.moments.items():
        kinds.setdefault(name, set()).add(kind)
        weight = weights.tensors.get(name)
        if weight is None:
            problems.append(f"{info.name} is of no weight that is stored")
        elif kind not in POWERS:
            if info.num_elements != 1:
                problems.append(f"{info.name} is none of {', '.join(POWERS)}")
        elif info.shape != weight.shape:
            problems.append(f"{info.name} has shape {list(info.shape)}, the weight {list(weight.shape)}")
        elif info.dtype not in GROWABLE_DTYPES:
            problems.append(f"{info.name} is stored as {info.dtype}")
    problems += [f"{name} has none" for name in weights.tensors if name not in kinds]
    if problems:
        raise CheckpointError(
            f"{state.directory}: moments cannot be carried: {'; '.join(problems)}; bring back the optimizer state of "
            "this run, or begin all moments at zero with --moments reset"
        )


def _weights(plan: GrowthPlan, header: DcpHeader) -> Iterator[Entry]:
    for name, grown in grown_weights(plan).items() if header.names.weights else ():
        yield TargetTensor(header.names.weight_key(name), grown.dtype, grown.growth.shape), grown
        if plan.tied_after and header.tied_head and name == plan.architecture.embedding:
            yield TargetTensor(header.tied_head, grown.dtype, grown.growth.shape), grown


def _moments(header: DcpHeader, planned: Mapping[str, ParameterMoments], files: str) -> Iterator[Entry]:
    of_source: dict[str, dict[str, TensorInfo]] = {}
    for (name, kind), info in header.moments.items():
        of_source.setdefault(name, {})[kind] = info
    for name, found in planned.items():
        read_from = None if found.reset else files
        for kind, info in of_source.get(found.source or "", {}).items():
            key = header.names.moment_key(name, kind)
            if kind in POWERS:
                power = POWERS[kind]
                grown = GrownTensor(key, read_from, info.name, info.dtype, found.growth, power, found.factor**power)
                yield TargetTensor(key, info.dtype, found.growth.shape), grown
            elif found.reset and kind != STEP:
                raise CheckpointError(
                    f"{header.directory}: {info.name} cannot be reset: what {kind} begins with is not known; carry the "
                    "moments, or convert the weights alone to safetensors first"
                )
            else:
                yield _as_it_is(info, files=read_from)


def _carried(header: DcpHeader, files: str) -> Iterator[Entry]:
    for key in header.names.carried:
        stored = header.dcp.tensors[key]
        yield _as_it_is(TensorInfo(key, stored.dtype, stored.shape, "", 0, stored.num_bytes), files=files)


def _as_it_is(info: TensorInfo, *, files: str | None) -> Entry:
    """A tensor that does not grow, in one row; zeros of its form if it is read from nowhere."""
    growth = TensorGrowth((IndexMap.identity(info.num_elements),), (False,))
    return TargetTensor(info.name, info.dtype, info.shape), GrownTensor(info.name, files, info.name, info.dtype, growth)


def _paths(plan: GrowthPlan, header: DcpHeader) -> dict[str, tuple[str | int, ...]]:
    """The path of each key in the nested state dict; that of a parameter that is new is like its source's."""
    paths = dict(header.dcp.paths)
    for tensor in plan.tensors if header.names.weights else ():
        if tensor.name not in header.names.weights:
            assert tensor.stored is not None, f"{tensor.name} grows from nothing"
            key, like = header.names.weight_key(tensor.name), header.names.weight_key(tensor.stored)
            paths[key] = header.path(key, like, tensor.stored, tensor.name)
    return paths


def _beta2(blobs: Mapping[str, bytes]) -> float | None:
    """How slowly Adam's second moments forget, from whichever value says it; read as tensors and plain values alone."""
    for key, octets in blobs.items():
        if "betas" in key or "param_groups" in key:
            with suppress(CheckpointError):
                if (betas := _betas_in(load_plain(octets, key))) is not None:
                    return float(betas[1])
    return None


def _betas_in(value: Any) -> Any:
    if isinstance(value, dict):
        return _betas_in(value.get("betas"))
    if isinstance(value, list | tuple):
        if len(value) == 2 and all(isinstance(beta, float) for beta in value):
            return value
        return next((found for item in value if (found := _betas_in(item)) is not None), None)
    return None
