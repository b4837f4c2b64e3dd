"""A live model's parameters by the rows of an architecture's table, whatever engine has wrapped the model."""

import re
from collections.abc import Iterable
from functools import cache

from torch import Tensor

# What engines put before a parameter's name: torch.compile, distributed data parallel, FSDP 1.
_PREFIXES = re.compile(r"(?:_orig_mod|module|_fsdp_wrapped_module)\.")


def row_of(name: str, rows: Iterable[str]) -> tuple[str, int | None] | None:
    """The row that a parameter stands in, such as `model.layers.{layer}.mlp.up_proj.weight`, and its layer if any.

    Args:
        name: As the model has it; `_orig_mod.`, `module.` and the like are looked through.
        rows: The rows to look in.
    """
    bare = _PREFIXES.sub("", name)
    for row in rows:
        if found := _pattern(row).fullmatch(bare):
            return row, int(found["layer"]) if "layer" in found.groupdict() else None
    return None


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to, None outside the layers; names as for `row_of`."""
    found = re.match(r"model\.layers\.(\d+)\.", _PREFIXES.sub("", name))
    return int(found[1]) if found else None


@cache
def _pattern(row: str) -> re.Pattern[str]:
    return re.compile(re.escape(row).replace(r"\{layer\}", r"(?P<layer>\d+)"))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`; most installations never import what defines it."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes, all of which have to ask for it."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole
