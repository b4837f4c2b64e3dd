"""Make a model directory to publish of a checkpoint: its weights and companions, and the model's code if asked for."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gdagrow
from gdagrow.archs import trained_of
from gdagrow.errors import CheckpointError, OutputError
from gdagrow.formats.companions import copy_companions, list_companions
from gdagrow.formats.links import require_inside
from gdagrow.formats.publish import check_free_space, require_all, require_apart, staged, write_file
from gdagrow.formats.safetensors_header import INDEX_FILE
from gdagrow.formats.watched import WatchedFiles
from gdagrow.header import Header
from gdagrow.models.config import GdaConfig
from gdagrow.record import RECORD_FILE
from gdagrow.rows import claim

# The model as transformers runs it and all that it needs of this package, which go flat beside the weights.
_CODE: Final = (
    "errors.py", "lambda_init.py", "models/config.py", "models/kernels.py", "models/layers.py", "models/hf_config.py",
    "models/hf_layers.py", "models/hf_stored.py", "models/hf_model.py",
)  # fmt: skip
_PREFIX: Final = "gdagrow_"
_AUTO_MAP: Final = {
    "AutoConfig": f"{_PREFIX}hf_config.MotifConfig",
    "AutoModelForCausalLM": f"{_PREFIX}hf_model.MotifForCausalLM",
}
_SPARE_BYTES: Final = 2**20  # for config and code
_BLOCK_BYTES: Final = 2**23


@dataclass(frozen=True)
class Export:
    """What was written: the directory, its files with their bytes, and the training state that was left behind."""

    target: Path
    weights: Mapping[str, int]
    code: tuple[str, ...]
    others: tuple[str, ...]
    left_behind: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.weights.values())


def export(header: Header, target: Path, *, with_code: bool, progress: Callable[[int], None] | None = None) -> Export:
    """Copy a checkpoint, or a model out of a Trainer's checkpoint, into `target`, which appears whole or not at all.

    Args:
        header: The checkpoint.
        target: The directory to make; it may exist if it is empty.
        with_code: Add the model's code and name it in `config.json`, for `trust_remote_code=True` where gdagrow is not
            installed.
        progress: Called with the number of bytes of weights written since its last call.

    Raises:
        CheckpointError: tensors do not fit the architecture, or the code could not run the model, or the checkpoint
            names other code.
        OutputError: the target exists or lies in the source, there is no room, or the disk refuses.
    """
    source, place = header.directory, Path(os.path.abspath(target))
    architecture = trained_of(header.config)
    claim(header, architecture, architecture.sizes(header.config))
    if with_code:
        _require_runnable(header)
    require_apart(source, place)
    weights = {name: require_inside(source, source / name).stat().st_size for name in header.shards}
    described = [name for name in (INDEX_FILE, RECORD_FILE) if (source / name).exists()]
    watched = WatchedFiles(source, ("config.json", *weights, *described))
    with staged(place) as partial:
        beside = sum((source / name).stat().st_size for name in list_companions(source).copied)
        check_free_space(place.parent, sum(weights.values()) + beside + _SPARE_BYTES)
        companions = copy_companions(source, partial)
        for name in (*weights, *described):
            _copy(source, partial, name, progress if name in weights else None)
        code = {_flat(path): _relative(_source_of(path)) for path in _CODE} if with_code else {}
        for name, text in code.items():
            write_file(partial / name, text.encode())
        if with_code:
            config = {**header.config, "auto_map": _AUTO_MAP}
            write_file(partial / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        else:
            _copy(source, partial, "config.json", None)
        require_all(partial, [*weights, *described, *companions.copied, *code, "config.json"])
        watched.require_unchanged()
    left_behind = tuple(skip.path for skip in companions.skipped if skip.reason.startswith("training state"))
    others = tuple(sorted({*companions.copied, *described} - code.keys()))
    return Export(target, weights, tuple(code), others, left_behind)


def _require_runnable(header: Header) -> None:
    config, directory = header.config, header.directory
    model_type = config.get("model_type")
    if str(model_type).lower() != "motif":
        raise CheckpointError(
            f"{directory}: --with-code brings the model of Motif's layout, and model_type is {model_type!r}, which "
            "transformers loads by itself; leave --with-code out"
        )
    if config.get("auto_map") not in (None, _AUTO_MAP):
        raise CheckpointError(
            f"{directory}: config.json names other code in auto_map ({json.dumps(config['auto_map'])}), which "
            "--with-code would replace; take auto_map and the files that it names out of a copy first, or leave "
            "--with-code out"
        )
    GdaConfig.from_dict(config)


def _flat(path: str) -> str:
    return _PREFIX + path.rpartition("/")[2]


def _source_of(path: str) -> str:
    return Path(gdagrow.__file__).parent.joinpath(path).read_text(encoding="utf-8")


def _relative(source: str) -> str:
    """A module's text with imports from beside itself, and where it comes from on top."""
    text = re.sub(r"^from gdagrow\.(?:\w+\.)*(\w+) import", rf"from .{_PREFIX}\1 import", source, flags=re.MULTILINE)
    return f"# Of gdagrow {gdagrow.__version__} (Apache-2.0), copied by `gdagrow export --with-code`.\n{text}"


def _copy(source: Path, destination: Path, name: str, progress: Callable[[int], None] | None) -> None:
    block = memoryview(bytearray(_BLOCK_BYTES))
    real = require_inside(source, source / name)
    try:
        with real.open("rb", buffering=0) as read, (destination / name).open("wb") as written:
            while count := read.readinto(block):
                written.write(block[:count])
                if progress:
                    progress(count)
    except OSError as error:
        raise OutputError(f"{real} cannot be copied to {destination} ({error.strerror}); check both") from None
