"""The files of a state: checked before an engine takes them as they are, and made a model of at the end."""

import shutil
from pathlib import Path
from typing import Any, Final

from gdagrow.checkpoint import read_checkpoint
from gdagrow.costs import checkpoint_figures
from gdagrow.dcp import DcpHeader
from gdagrow.dcp_tensors import DcpTensors
from gdagrow.export import export
from gdagrow.format_conversion import convert_format, plan_conversion
from gdagrow.formats.byte_tokenizer import write_byte_tokenizer
from gdagrow.formats.kind import SHARDED_WEIGHTS, Format
from gdagrow.formats.publish import copy_companions
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.torch_file import load_plain
from gdagrow.header import Header
from gdagrow.record import RECORD_FILE
from gdagrow.states.dcp_checkpoint import read_trees
from gdagrow.states.optimizer_file import read_optimizer
from gdagrow.train.configs import is_sharded
from gdagrow.train.recipe import TrainRecipe

_MAX_FILE_BYTES: Final = 5 * 10**9
_TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CONFIG: Final = "config.json"


def read_state(state: Path) -> Header:
    """The weights of a state, by name.

    Raises:
        CheckpointError: a file of it is missing or damaged, holds code, or is of another model: an engine would run the
            code, and write beyond moments of the wrong shape.
    """
    header = read_checkpoint(state)
    checkpoint_figures(header)
    if isinstance(header, DcpHeader):
        for tree in read_trees(header):
            _require_plain_values(tree)
    else:
        read_optimizer(header, check_moments=False)  # shapes are checked; an optimizer that begins anew has none
    return header


def _require_plain_values(tree: DcpHeader) -> None:
    with DcpTensors(tree) as reader:
        for key in tree.dcp.blobs:
            load_plain(reader.blob(key), f"{tree.directory / tree.place}: the value {key!r}")


def make_model(recipe: TrainRecipe, state: Path, target: Path) -> None:
    """Make a model directory of a state, as a stream; `target` is missing or empty.

    The files beside the weights are those of the directory that the run started from, and its tokenizer's.

    Raises:
        GdagrowError: the state cannot be read, or the disk refuses.
    """
    if is_sharded(state):
        source = state / SHARDED_WEIGHTS
        conversion = plan_conversion(source, Format.safetensors, config=state / _CONFIG, max_file_bytes=_MAX_FILE_BYTES)
        convert_format(conversion, target)
    else:
        export(read_header(state), target, with_code=False)
    if (state / RECORD_FILE).exists():
        shutil.copyfile(state / RECORD_FILE, target / RECORD_FILE)
    if recipe.model.directory is not None:
        copy_companions(recipe.model.directory, target)
    _add_tokenizer(recipe, read_header(target).config, target)


def _add_tokenizer(recipe: TrainRecipe, config: Any, target: Path) -> None:
    if (target / _TOKENIZER[0]).exists():
        return
    if recipe.data.tokenizer == "bytes":
        if config["vocab_size"] == 256:
            write_byte_tokenizer(target, recipe.context_length)
        return
    for name in _TOKENIZER:
        if (path := Path(recipe.data.tokenizer) / name).exists():
            shutil.copyfile(path, target / name)
