"""What may be chosen by name, and what is taken if nothing is said.

The command line is parsed with these and `gdagrow.errors` alone, so that `--help` and a completion wait for nothing
that only the work itself needs.
"""

from enum import Enum
from typing import Final

# The default noise is 40 dB below the weights (1% of each, in amplitude): just above the grid of bf16 (0.4 to 0.8%),
# the coarsest stored dtype, so copies part there too; enough to part all of them (tests/numerics/test_symmetry.py).
DEFAULT_SNR_DB: Final = 40.0
DEFAULT_MAX_SHARD_SIZE: Final = "5GB"


class Format(str, Enum):
    """How weights are stored: in safetensors files, or as a torch distributed checkpoint (DCP)."""

    dcp = "dcp"
    safetensors = "safetensors"

    __str__ = str.__str__  # as in StrEnum, which came with Python 3.11


class Moments(str, Enum):
    """What becomes of optimizer moments: `auto` carries those that the mirror rule grows exactly, and resets others."""

    auto = "auto"
    carry = "carry"
    reset = "reset"


class Schedule(str, Enum):
    """What becomes of a run's schedule: go on where it was, or begin the run's new one at step 0."""

    keep = "keep"
    restart = "restart"

    __str__ = str.__str__
