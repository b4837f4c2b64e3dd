"""JSON read without charity: what two readers could understand differently is refused."""

import json
from collections import Counter
from math import isinf
from typing import Any, NoReturn

from gdagrow.errors import CheckpointError


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse `raw` as one JSON object; `where` names its file in errors.

    Raises:
        CheckpointError: invalid UTF-8 or JSON, a duplicate key, NaN or an infinite number, nesting too deep, or
            anything but an object at the top.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep to be a checkpoint's; restore the file") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}; restore the file")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        duplicates = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"duplicate keys: {', '.join(map(repr, duplicates))}")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"{text} does not fit a float")
    return value
