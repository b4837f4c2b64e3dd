"""JSON read without charity: what two readers could understand differently is refused."""

import json
import re
from collections import Counter
from math import isinf
from typing import Any, Final, NoReturn

from gdagrow.errors import CheckpointError

# What reads a tree later goes down with it; no checkpoint's has more than ten levels.
_MAX_DEPTH: Final = 100
_LONG_NUMBER: Final = re.compile(rb"[0-9]{300}")


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse `raw` as one JSON object; `where` names its file in errors.

    Raises:
        CheckpointError: invalid UTF-8 or JSON, a duplicate key, NaN, a number that no float can hold, nesting too deep,
            or anything but an object at the top.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite,
            parse_int=_fitting if _LONG_NUMBER.search(raw) else None,
        )  # fmt: skip
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}; restore the file")
    _require_shallow(value, where)
    return value


def _require_shallow(tree: Any, where: str) -> None:
    level = [tree]
    for _ in range(_MAX_DEPTH):
        children = (node.values() if type(node) is dict else node for node in level)
        level = [child for of_node in children for child in of_node if type(child) in (dict, list)]
        if not level:
            return
    raise _too_deep(where)


def _too_deep(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: JSON nested too deep to be a checkpoint's, more than {_MAX_DEPTH} levels; restore the file"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        duplicates = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"duplicate keys: {', '.join(map(repr, duplicates))}")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _fitting(text: str) -> int:
    _finite(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text} does not fit a float")
    return value
