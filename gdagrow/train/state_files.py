"""The files of a state: checked before an engine takes them as they are, and made a model of at the end."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

from gdagrow.checkpoint import read_checkpoint
from gdagrow.choices import Format
from gdagrow.costs import checkpoint_figures
from gdagrow.dcp import DcpHeader
from gdagrow.dcp_tensors import DcpTensors
from gdagrow.errors import CheckpointError
from gdagrow.export import export
from gdagrow.format_conversion import convert_format, plan_conversion
from gdagrow.formats.byte_tokenizer import write_byte_tokenizer
from gdagrow.formats.companions import copy_companions
from gdagrow.formats.kind import SHARDED_WEIGHTS
from gdagrow.formats.links import require_inside
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.small_file import read_small_file
from gdagrow.formats.torch_file import load_plain, require_plain_pickle
from gdagrow.header import Header
from gdagrow.record import RECORD_FILE
from gdagrow.states.dcp_checkpoint import read_trees
from gdagrow.states.optimizer_file import read_optimizer
from gdagrow.states.trainer_checkpoint import STATE_FILE
from gdagrow.train.configs import is_sharded
from gdagrow.train.recipe import TrainRecipe

_MAX_FILE_BYTES: Final = 5 * 10**9
_TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CONFIG: Final = "config.json"
# What the Trainer loads by itself.
_LOADED: Final = re.compile(r"scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")


def read_state(state: Path) -> Header:
    """The weights of a state, by name.

    Raises:
        CheckpointError: a file of it is missing or damaged, holds code, or is of another model: an engine would run the
            code, and write beyond moments of the wrong shape.
    """
    header = read_checkpoint(state)
    checkpoint_figures(header)
    _require_trainer_state(state)
    for path in sorted(path for path in state.iterdir() if _LOADED.fullmatch(path.name)):
        require_plain_pickle(io.BytesIO(read_small_file(require_inside(state, path))), str(path))
    if isinstance(header, DcpHeader):
        for tree in read_trees(header):
            _require_plain_values(tree)
    else:
        read_optimizer(header, check_moments=False)  # shapes are checked; an optimizer that begins anew has none
    return header


@contextmanager
def refusing_what_is_not_plain(state: Path, file: str) -> Iterator[None]:
    """Say it when torch refuses a small file of a state, or cannot read it, while an engine loads it.

    Raises:
        CheckpointError: it does.
    """
    try:
        yield
    except (UnpicklingError, RuntimeError, EOFError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise CheckpointError(
            f"{state / file} is damaged or asks for more than tensors and plain values; nothing in it was run: restore "
            "the state"
        ) from None


def _require_trainer_state(state: Path) -> None:
    from transformers import TrainerState

    path = state / STATE_FILE
    try:
        TrainerState(**json.loads(read_small_file(path)))
    except CheckpointError:
        raise
    except Exception:  # whatever its fields do not take
        raise CheckpointError(
            f"{path}: expected the state of a Trainer, got something else; restore the state"
        ) from None


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
