"""Numbers as people read them: two decimals and a unit, whole numbers below a thousand."""

from collections.abc import Sequence
from typing import Final

_COUNTS: Final = ("", " K", " M", " B", " T")
_BYTES: Final = (" bytes", " kB", " MB", " GB", " TB", " PB")
_FLOPS: Final = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP")


def count_text(number: int) -> str:
    """`2.60 B` for 2,597,000,000."""
    return _scaled(number, _COUNTS)


def bytes_text(num_bytes: float) -> str:
    """`5.19 GB` for 5,190,000,000: powers of a thousand."""
    return _scaled(num_bytes, _BYTES)


def flops_text(flops: int) -> str:
    """`5.19 GFLOP` for 5,190,000,000."""
    return _scaled(flops, _FLOPS)


def times_text(before: float, after: float) -> str:
    """`x2` or `x1.87` for how many times more it is; `=` for no more and no less."""
    if before == after:
        return "="
    return f"x{after / before:.2f}".removesuffix(".00")


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 0
    while round(number / 1000**power, 2) >= 1000 and power < len(units) - 1:
        power += 1
    return f"{number / 1000**power:.2f}{units[power]}" if power else f"{number:.0f}{units[0]}"
