"""In which format a checkpoint directory stores its weights."""

import os
from pathlib import Path
from typing import Final

from gdagrow.choices import Format
from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_metadata import METADATA_FILE, is_dcp
from gdagrow.formats.safetensors_header import INDEX_FILE, SINGLE_FILE

# Where transformers' Trainer keeps what several processes sharded between them.
SHARDED_WEIGHTS: Final = "pytorch_model_fsdp_0"
SHARDED_OPTIMIZER: Final = "optimizer_0"


def place_of_weights(directory: Path) -> str:
    """The directory in a checkpoint that holds its weights as DCP: empty if it is that itself."""
    return SHARDED_WEIGHTS if is_dcp(directory / SHARDED_WEIGHTS) and not is_dcp(directory) else ""


def format_of(directory: Path) -> Format:
    """How a checkpoint stores its weights; what is neither is for the reader of safetensors to refuse.

    Raises:
        CheckpointError: it has weights in both formats.
    """
    place = place_of_weights(directory)
    if not is_dcp(directory / place):
        return Format.safetensors
    if others := [name for name in (SINGLE_FILE, INDEX_FILE) if os.path.lexists(directory / name)]:
        raise CheckpointError(
            f"{directory} has both {Path(place, METADATA_FILE)} and {others[0]}, so it is ambiguous which holds the "
            "model; remove the one that is stale"
        )
    return Format.dcp
