"""A torch distributed checkpoint and what a growth makes of it: weights and moments, tensor by tensor."""

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from gdagrow.axes import IndexMap
from gdagrow.dcp import DcpHeader
from gdagrow.dcp_tensors import DcpTensors, require_tied
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.formats.dcp_layout import plan_dcp
from gdagrow.formats.dcp_metadata import METADATA_FILE
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.growth import TensorGrowth
from gdagrow.header import TensorInfo
from gdagrow.moments import POWERS, Moments, ParameterMoments, Schedule, moments_record, plan_moments
from gdagrow.output import WEIGHTS, GrownTensor, Output, grown_weights
from gdagrow.plan import GrowthPlan
from gdagrow.rows import GROWABLE_DTYPES

STEP: Final = "step"

Entry = tuple[TargetTensor, GrownTensor]


def dcp_output(plan: GrowthPlan, *, moments: Moments, schedule: Schedule, max_file_bytes: int) -> Output:
    """All that a growth writes of a distributed checkpoint: the same state dict, grown, for any number of ranks.

    Args:
        plan: The growth; its header is a `DcpHeader`.
        moments: What becomes of optimizer moments.
        schedule: Only `keep`: what a schedule is called in a state dict is the engine's own affair.
        max_file_bytes: The largest file, unless a single tensor is larger.

    Raises:
        CheckpointError: moments do not fit their weights, or are of a kind that cannot be grown.
        PlanError: what is asked for would change values that are carried unread.
    """
    header = plan.header
    assert isinstance(header, DcpHeader), "a distributed checkpoint is grown as it is stored"
    _require_possible(plan, header, schedule)
    planned = plan_moments(plan, moments)
    if moments is not Moments.reset:
        _require_moments(header)
    entries = [*_weights(plan, header), *_moments(header, planned), *_carried(header)]
    with DcpTensors(header) as reader:
        require_tied(header, reader)
        blobs = {key: reader.blob(key) for key in header.dcp.blobs}
    layout = plan_dcp([target for target, _ in entries], blobs, _paths(plan, header, planned), max_file_bytes)
    return Output(
        layout.files,
        {target.name: grown for target, grown in entries},
        {WEIGHTS: header},
        {METADATA_FILE: layout.metadata},
        record=moments_record(planned, moments, schedule, _beta2(blobs)) if header.moments else {},
    )


def _require_possible(plan: GrowthPlan, header: DcpHeader, schedule: Schedule) -> None:
    if schedule is not Schedule.keep:
        raise PlanError(
            f"--schedule {schedule}: a distributed checkpoint's schedule has no name that all engines know; keep it, "
            "and have the engine leave it out when it loads (torchtitan: checkpoint.exclude_from_loading)"
        )
    if header.moments and plan.tied_before and not plan.tied_after:
        raise PlanError(
            f"embeddings untie: the head would be new to the optimizer in {header.directory}, whose groups are pickles "
            "that are carried unread; keep the embeddings tied, or convert the weights alone to safetensors first"
        )


def _require_moments(header: DcpHeader) -> None:
    kinds: dict[str, set[str]] = {}
    problems = []
    for (name, kind), info in header.moments.items():
        kinds.setdefault(name, set()).add(kind)
        if kind not in POWERS:
            if info.num_elements != 1:
                problems.append(f"{info.name} is none of {', '.join(POWERS)}")
        elif info.shape != header.tensors[name].shape:
            problems.append(f"{info.name} has shape {list(info.shape)}, the weight {list(header.tensors[name].shape)}")
        elif info.dtype not in GROWABLE_DTYPES:
            problems.append(f"{info.name} is stored as {info.dtype}")
    if kinds:
        problems += [f"{name} has none" for name in header.tensors if name not in kinds]
    if problems:
        raise CheckpointError(
            f"{header.directory}: moments cannot be carried: {'; '.join(problems)}; bring back the optimizer state of "
            "this run, or begin all moments at zero with --moments reset"
        )


def _weights(plan: GrowthPlan, header: DcpHeader) -> Iterator[Entry]:
    for name, grown in grown_weights(plan).items():
        yield TargetTensor(header.names.weight_key(name), grown.dtype, grown.growth.shape), grown
        if plan.tied_after and header.tied_head and name == plan.architecture.embedding:
            yield TargetTensor(header.tied_head, grown.dtype, grown.growth.shape), grown


def _moments(header: DcpHeader, planned: Mapping[str, ParameterMoments]) -> Iterator[Entry]:
    of_source: dict[str, dict[str, TensorInfo]] = {}
    for (name, kind), info in header.moments.items():
        of_source.setdefault(name, {})[kind] = info
    for name, found in planned.items():
        for kind, info in of_source.get(found.source, {}).items():
            key = header.names.moment_key(name, kind)
            if kind in POWERS:
                files = None if found.reset else WEIGHTS
                grown = GrownTensor(key, files, info.name, info.dtype, found.growth, power=POWERS[kind])
                yield TargetTensor(key, info.dtype, found.growth.shape), grown
            elif found.reset and kind != STEP:
                raise CheckpointError(
                    f"{header.directory}: {info.name} cannot be reset: what {kind} begins with is not known; carry the "
                    "moments, or convert the weights alone to safetensors first"
                )
            else:
                yield _as_it_is(info, files=None if found.reset else WEIGHTS)


def _carried(header: DcpHeader) -> Iterator[Entry]:
    for key in header.names.carried:
        stored = header.dcp.tensors[key]
        yield _as_it_is(TensorInfo(key, stored.dtype, stored.shape, "", 0, stored.num_bytes), files=WEIGHTS)


def _as_it_is(info: TensorInfo, *, files: str | None) -> Entry:
    """A tensor that does not grow, in one row; zeros of its form if it is read from nowhere."""
    growth = TensorGrowth((IndexMap.identity(info.num_elements),), (False,))
    return TargetTensor(info.name, info.dtype, info.shape), GrownTensor(info.name, files, info.name, info.dtype, growth)


def _paths(
    plan: GrowthPlan, header: DcpHeader, planned: Mapping[str, ParameterMoments]
) -> dict[str, tuple[str | int, ...]]:
    """The path of each key in the nested state dict; that of a parameter that is new is like its source's."""
    paths = dict(header.dcp.paths)
    for tensor in plan.tensors:
        if tensor.name not in header.names.weights:
            key, like = header.names.weight_key(tensor.name), header.names.weight_key(tensor.source.name)
            paths[key] = header.path(key, like, tensor.source.name, tensor.name)
    return paths


def _beta2(blobs: Mapping[str, bytes]) -> float | None:
    """How slowly Adam's second moments forget, from whichever value says it; read as tensors and plain values alone."""
    for key, octets in blobs.items():
        if "betas" in key or "param_groups" in key:
            try:
                value = torch.load(io.BytesIO(octets), weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
                continue
            if (betas := _betas_in(value)) is not None:
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
