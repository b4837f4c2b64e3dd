"""Which head, or which axis, an index of a stored dimension belongs to."""

from collections.abc import Mapping

from gdagrow.axes import Expression
from gdagrow.coordinates import coordinates


def head_at(dim: Expression, sizes: Mapping[str, int], index: int) -> str:
    """Name the head that an index stands in: `signal head 2 of group 1`, `noise head of group 0`, `KV group 3`.

    Args:
        dim: The dimension in arrow notation, such as `(group (signal + 1) head_dim)`.
        sizes: Axis sizes; `signal` is the number of signal heads in one group.
        index: Where in the dimension.

    Returns:
        The empty text for a dimension without heads.
    """
    found = dict(coordinates(dim, sizes, index))
    if "signal" in found:
        return f"signal head {found['signal']} of group {found['group']}"
    if "group" in found:
        return f"noise head of group {found['group']}"
    return f"KV group {found['kv']}" if "kv" in found else ""


def axis_at(dim: Expression, sizes: Mapping[str, int], index: int) -> str:
    """Name the axis whose growth an index follows: `signal`, `noise` or `kv` for its head, else `hidden`, `ffn`, ..."""
    found = dict(coordinates(dim, sizes, index))
    if "group" in found:
        return "signal" if "signal" in found else "noise"
    return next((axis for axis in found if not axis.isdigit()), "")
