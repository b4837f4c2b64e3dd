"""Old heads or whole blocks kept exactly as they are for some steps, while what growth added learns.

A gradient of zero would not do: weight decay and momentum move a weight without any. So what is frozen is put back
after each step; a parameter that is frozen whole has no gradient in a step instead, which every optimizer of torch
takes for none of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from gdagrow.archs import Parameter, architecture_of
from gdagrow.axes import IndexMap
from gdagrow.errors import CheckpointError, GdagrowError
from gdagrow.record import RECORD_FILE, read_record
from gdagrow.train.parameters import is_sharded, layer_of, row_of
from gdagrow.verify.ancestry import Ancestry, last_growth
from gdagrow.verify.places import head_at


@dataclass(frozen=True)
class Part:
    """Consecutive indices `[start, stop)` of one dimension of a parameter."""

    dim: int
    start: int
    stop: int


# A parameter that is frozen whole.
WHOLE: Final[tuple[Part, ...]] = ()

# What is frozen, by parameter name: `WHOLE`, or parts of it.
Frozen = dict[str, tuple[Part, ...]]


def blocks(names: Iterable[str], layers: Sequence[int]) -> Frozen:
    """All parameters of some layers.

    Args:
        names: The names of the model's parameters.
        layers: Indices of layers.

    Raises:
        GdagrowError: a layer is not there.
    """
    of_name = {name: layer for name in names if (layer := layer_of(name)) is not None}
    missing = sorted(set(layers) - set(of_name.values()))
    if missing:
        raise GdagrowError(
            f"layers to freeze: the model has no layer {', '.join(map(str, missing))}, only "
            f"{len(set(of_name.values()))} layers counted from 0"
        )
    return {name: WHOLE for name, layer in of_name.items() if layer in layers}


def old_heads(config: Mapping[str, Any], directory: Path, names: Iterable[str]) -> Frozen:
    """The heads that there were before the last growth: the first copy of each, where a head was cloned, in all layers.

    They are rows of `q_proj`, `k_proj` and `v_proj` with their biases, and columns of `o_proj`. KV groups that were not
    cloned serve old and new heads alike and are kept whole. Lambda and the sub-norm belong to all heads and are not
    kept, nor is what feeds the heads.

    Args:
        config: The content of the grown model's `config.json`.
        directory: Where its `growth.json` is.
        names: The names of the model's parameters.

    Raises:
        CheckpointError: there is no `growth.json`, or it is not of a model with this config.
        GdagrowError: the last growth cloned no heads.
    """
    table, ancestry = _last_growth(config, directory)
    before = ancestry.before
    if before.heads == architecture_of(config).sizes(config).heads:
        raise GdagrowError(
            f"{directory / RECORD_FILE}: the last growth cloned no heads, so all of them are old; freeze layers instead"
        )
    frozen: Frozen = {}
    for name in names:
        row, layer = row_of(name, table) or ("", None)
        if not row or layer in ancestry.layers.new:
            continue
        notation = table[row].parsed
        growth = ancestry.maps.growth(notation.text, layer or 0)
        for dim, (expression, index_map) in enumerate(zip(notation.dims, growth.dims, strict=True)):
            if head_at(expression, before.axes, 0):
                frozen[name] = _first_copies(dim, index_map)
    return frozen


def old_layers(config: Mapping[str, Any], directory: Path) -> list[int]:
    """The blocks that there were before the last growth, by their index now.

    Args:
        config: The content of the grown model's `config.json`.
        directory: Where its `growth.json` is.

    Raises:
        CheckpointError: there is no `growth.json`, or it is not of a model with this config.
        GdagrowError: the last growth added no blocks.
    """
    _, ancestry = _last_growth(config, directory)
    layers = ancestry.layers
    if not layers.new:
        raise GdagrowError(
            f"{directory / RECORD_FILE}: the last growth added no blocks, so all of them are old; freeze heads instead"
        )
    return [layer for layer in range(len(layers.source)) if layer not in layers.new]


def _last_growth(config: Mapping[str, Any], directory: Path) -> tuple[dict[str, Parameter], Ancestry]:
    """The table by name, and where the last growth took everything from."""
    architecture = architecture_of(config)
    if not read_record(directory):
        raise CheckpointError(f"{directory}: no {RECORD_FILE}, which says what is old; freeze layers by index instead")
    table = {parameter.name: parameter for parameter in architecture.table(config)}
    return table, last_growth(directory, architecture.sizes(config))


def _first_copies(dim: int, index_map: IndexMap) -> tuple[Part, ...]:
    parts: list[Part] = []
    for segment in index_map.segments:
        if segment.copy:
            continue
        if parts and parts[-1].stop == segment.new:
            parts[-1] = Part(dim, parts[-1].start, segment.new + segment.length)
        else:
            parts.append(Part(dim, segment.new, segment.new + segment.length))
    return WHOLE if parts == [Part(dim, 0, index_map.size)] else tuple(parts)


class Freezer:
    """What `freeze` holds on to: `steps_left` of it, and `remove` to end it early."""

    def __init__(self, optimizer: Optimizer, frozen: Mapping[nn.Parameter, Sequence[Part]], num_steps: int) -> None:
        self.steps_left = num_steps
        self._frozen = dict(frozen)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Let everything move again."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()  # a step that raised may have moved something
        for parameter, parts in self._frozen.items():
            if not parts:
                parameter.grad = None
                continue
            views = [view for part in parts if (view := _view(parameter, part)) is not None]
            self._kept += [(view, view.clone()) for view in views]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()
        self.steps_left -= 1
        if not self.steps_left:
            self.remove()

    def _put_back(self) -> None:
        for view, value in self._kept:
            view.copy_(value)
        self._kept.clear()


def _view(parameter: nn.Parameter, part: Part) -> Tensor | None:
    """What this process holds of a part of a parameter, None if that is nothing."""
    values, start, stop = parameter.detach(), part.start, part.stop
    if is_sharded(values):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = values.device_mesh, values.placements  # type: ignore[attr-defined]
        shape, offset = compute_local_shape_and_global_offset(values.shape, mesh, placements)
        first, size = offset[part.dim], shape[part.dim]
        start, stop = max(start - first, 0), min(stop - first, size)
        values = values.to_local()  # type: ignore[attr-defined]
    return values.narrow(part.dim, start, stop - start) if start < stop else None


def freeze(optimizer: Optimizer, model: nn.Module, frozen: Frozen, *, num_steps: int) -> Freezer:
    """Keep parameters, or parts of them, bit for bit as they are for some steps of an optimizer.

    While frozen, a part takes the memory of a copy during each step, and its moments go on averaging its gradients; a
    parameter that is frozen whole takes none, and its moments stand still. Parameters may be sharded (`DTensor`).

    Args:
        optimizer: The one that steps them, itself, not what an engine wraps around it; its steps take no closure. Call
            this once a resumed run has loaded its state: distributed checkpoints take a step to make room for it.
        model: Has the parameters.
        frozen: What, from `blocks` or `old_heads`, or both in one dict.
        num_steps: For how many steps, 1 or more; fewer if some were taken before a run was resumed.

    Raises:
        GdagrowError: `frozen` is empty or names a parameter that the model has not, or `num_steps` is below 1.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name in frozen if name not in parameters]
    if missing or not frozen:
        raise GdagrowError(
            f"to freeze: {', '.join(missing) or 'nothing'}; expected names of the model's parameters, as it has them"
        )
    if num_steps < 1:
        raise GdagrowError(f"steps to freeze: expected 1 or more, got {num_steps}")
    return Freezer(optimizer, {parameters[name]: parts for name, parts in frozen.items()}, num_steps)
