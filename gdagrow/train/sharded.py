"""States of several processes loaded by one, and the other way round."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from gdagrow.formats.kind import SHARDED_OPTIMIZER, SHARDED_WEIGHTS


def load_sharded(state: Path, model: nn.Module, optimizer: Any = None) -> None:
    """Load the weights, or with an optimizer its moments, of a sharded state into one process.

    Args:
        state: The directory.
        model: Whole.
        optimizer: Of that model's parameters.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        if optimizer is None:
            tree: dict[str, Any] = {"model": get_model_state_dict(model)}
            load(tree, storage_reader=FileSystemReader(state / SHARDED_WEIGHTS), no_dist=True)
            set_model_state_dict(model, tree["model"])
        else:
            inner = unwrapped(optimizer)
            tree = {"optimizer": get_optimizer_state_dict(model, inner)}
            load(tree, storage_reader=FileSystemReader(state / SHARDED_OPTIMIZER), no_dist=True)
            set_optimizer_state_dict(model, inner, tree["optimizer"])


def load_whole_optimizer(state: Path, model: nn.Module, optimizer: Any) -> None:
    """Load the optimizer that one process saved into a model that several have sharded; the first one reads.

    Where it keeps nothing of a parameter, such as one of a new block, it begins at zero: torch asks for all of them.
    """
    inner = unwrapped(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    get_optimizer_state_dict(model, inner)  # makes room for all
    ordered = [[names[parameter] for parameter in group["params"]] for group in inner.param_groups]
    named: dict[str, Any] = {}
    if torch.distributed.get_rank() == 0:
        stored = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
        flat = [name for group in ordered for name in group]
        named["state"] = {flat[index]: moments for index, moments in stored["state"].items()}
        missing = {name: parameter for parameter, name in names.items() if name not in named["state"]}
        named["state"] |= {name: _zeros(inner.state[parameter]) for name, parameter in missing.items()}
        named["param_groups"] = [
            {**group, "params": group_names}
            for group, group_names in zip(stored["param_groups"], ordered, strict=True)
        ]  # fmt: skip
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, inner, named, options=options)


def _zeros(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps of a parameter that it has not stepped yet, whole."""
    return {
        key: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for key, value in kept.items()
    }


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the one that accelerate hands out."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
