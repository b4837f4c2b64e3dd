"""Which tensor of a DCP directory is which weight, and which moment of which weight: by prefixes of their keys.

A key is a path in the state dict that was saved, joined by dots: `model.` or nothing, wrappers' names such as
`_orig_mod.` or `module.`, and the parameter's name; an optimizer's has `optim.state.` or the like before it and the
moment's name (`exp_avg`, `exp_avg_sq`, `momentum_buffer`, `step`) behind.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_metadata import DcpMetadata, StoredTensor

_STATE: Final = "state"  # the branch of an optimizer's state dict that holds the moments
_WHOLE: Final = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


@dataclass(frozen=True)
class DcpNames:
    """What the keys of a DCP directory stand for.

    weights: Parameter name to key.
    moments: (parameter name, moment's name) to key; `step` is one of them.
    carried: Keys of all other tensors: scalars and whole numbers, which do not depend on the model's sizes.
    prefix: What stands before a parameter's name in a weight's key.
    moment_prefixes: The same for each moment's name.
    """

    weights: Mapping[str, str]
    moments: Mapping[tuple[str, str], str]
    carried: tuple[str, ...]
    prefix: str
    moment_prefixes: Mapping[str, str]

    def weight_key(self, name: str) -> str:
        """The key for a weight, also for one that the directory does not have."""
        return self.prefix + name

    def moment_key(self, name: str, moment: str) -> str:
        """The key for a moment, also for one that the directory does not have; its kind must be there."""
        return f"{self.moment_prefixes[moment]}{name}.{moment}"


def name_keys(stored: DcpMetadata, parameters: Collection[str]) -> DcpNames:
    """Give every tensor of a directory its meaning.

    Args:
        stored: The directory.
        parameters: The names of every parameter that the model may have.

    Raises:
        CheckpointError: a tensor stands for nothing, or weights or moments of one kind have different prefixes; names
            all of them.
    """
    names = frozenset(parameters)
    weights: dict[str, dict[str, str]] = {}  # prefix to parameter to key
    moments: dict[str, dict[str, dict[str, str]]] = {}  # moment to prefix to parameter to key
    carried, unknown = [], []
    for key, tensor in stored.tensors.items():
        if found := _parameter_in(key, names):
            weights.setdefault(key.removesuffix(found), {})[found] = key
            continue
        branch, _, moment = key.rpartition(".")
        found = _parameter_in(branch, names)
        if found and _STATE in branch.removesuffix(found).split("."):
            moments.setdefault(moment, {}).setdefault(branch.removesuffix(found), {})[found] = key
        elif _does_not_grow(tensor):
            carried.append(key)
        else:
            unknown.append(key)
    _require_known(stored, unknown, weights or moments)
    prefix = _only_prefix(stored, "weights", weights) if weights else ""
    prefixes = {moment: _only_prefix(stored, moment, found) for moment, found in moments.items()}
    by_moment = {(name, moment): key for moment, found in moments.items()
                 for name, key in found[prefixes[moment]].items()}  # fmt: skip
    return DcpNames(weights.get(prefix, {}), by_moment, tuple(carried), prefix, prefixes)


def renamed_path(path: tuple[str | int, ...], old: str, new: str) -> tuple[str | int, ...]:
    """The path of parameter `new` in a nested state dict, where that of parameter `old` is `path`."""
    return tuple(
        part.removesuffix(old) + new if isinstance(part, str) and part.endswith(old) else part for part in path
    )


def _parameter_in(key: str, names: frozenset[str]) -> str | None:
    """The longest parameter name that a key ends with, after nothing or a dot."""
    at = 0
    while key[at:] not in names:
        at = key.find(".", at) + 1
        if not at:
            return None
    return key[at:]


def _does_not_grow(tensor: StoredTensor) -> bool:
    return not tensor.shape or tensor.dtype in _WHOLE


def _require_known(stored: DcpMetadata, unknown: list[str], known: Mapping[str, object]) -> None:
    if not known:
        raise CheckpointError(
            f"{stored.directory}: none of its {len(stored.tensors)} tensors is named as a parameter of the model in "
            "config.json, with or without a prefix; give the config.json that belongs to it, or rename the tensors: "
            + "; ".join(stored.tensors)
        )
    if unknown:
        raise CheckpointError(
            f"{stored.directory}: {len(unknown)} tensors belong to no parameter of the model in config.json; leave "
            "them out when saving, or rename them: " + "; ".join(unknown)
        )


def _only_prefix(stored: DcpMetadata, what: str, found: Mapping[str, Mapping[str, str]]) -> str:
    most = max(found, key=lambda prefix: len(found[prefix]))
    others = [key for prefix, keys in found.items() if prefix != most for key in keys.values()]
    if others:
        raise CheckpointError(
            f"{stored.directory}: expected the prefix {most!r} before all {what}, as {len(found[most])} of them have "
            f"it, got others, so that it is unclear which belong to the model; leave out: {'; '.join(others)}"
        )
    return most
