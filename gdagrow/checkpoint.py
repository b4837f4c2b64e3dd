"""A checkpoint of any format, by what it says of itself."""

from pathlib import Path

from gdagrow.choices import Format
from gdagrow.dcp import read_dcp
from gdagrow.errors import CheckpointError
from gdagrow.formats.kind import format_of, place_of_weights
from gdagrow.formats.safetensors_header import read_header
from gdagrow.header import Header


def read_checkpoint(directory: Path, config: Path | None = None) -> Header:
    """Read the config and the tensors' names of a checkpoint: safetensors files or a torch distributed checkpoint.

    Args:
        directory: The checkpoint.
        config: The `config.json` of a distributed checkpoint that has none, or a directory that has it.

    Raises:
        CheckpointError: it is not a complete, consistent checkpoint of one of these formats.
    """
    if format_of(directory) is Format.dcp:
        return read_dcp(directory, config, place_of_weights(directory))
    if config is not None:
        raise CheckpointError(f"--config is for distributed checkpoints; {directory} has a config.json of its own")
    return read_header(directory)
