"""The files of a checkpoint beside its weights: which of them go with what is made of it."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from gdagrow.errors import CheckpointError, OutputError
from gdagrow.formats.links import require_inside
from gdagrow.formats.safetensors_header import INDEX_FILE, read_weight_map
from gdagrow.formats.watched import WatchedFiles

# What of a source is not carried along, and why: pattern of a name, reason. A trailing slash means a directory.
_REWRITTEN: Final = (("config.json", "rewritten"), ("growth.json", "rewritten"))  # at the top of the directory only
_STATE: Final = "training state of the source, wrong beside grown weights"
_WEIGHTS: Final = "weights of the source"
_LEFT_BEHIND: Final = (
    *((pattern, _STATE) for pattern in (
        "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scaler*.pt", "rng_state*.pth", "trainer_state.json",
        "training_args.bin", "global_step*/", "checkpoint-*/", "latest",
    )),
    *((pattern, _WEIGHTS) for pattern in (
        "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.h5", "*.h5.index.json",
        "*.msgpack", "*.msgpack.index.json", "*.pt", "*.pth", "*.onnx", "*.onnx_data",
        "*.distcp", ".metadata",
    )),
    (".git/", "history of the source"),
    (".cache/", "download records of the source"),
    (".*.gdagrow-partial-*/", "an unfinished output of gdagrow"),
)  # fmt: skip


@dataclass(frozen=True)
class SkippedFile:
    """A file, or a directory with a trailing slash, that is not carried along; `path` is relative to the source."""

    path: str
    reason: str


@dataclass(frozen=True)
class Companions:
    """The files beside the weights: paths relative to the source that are copied, and those that are not."""

    copied: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]


def list_companions(source: Path, carried: Collection[str] = ()) -> Companions:
    """Say which files of a source directory, weights aside, go with a model grown from it; nothing is written.

    Args:
        source: The directory.
        carried: Names of files at its top that go along whatever they are.

    Raises:
        CheckpointError: a link leads out of the directory, or a part of it cannot be listed.
    """
    copied: list[str] = []
    skipped: list[SkippedFile] = []

    def unreadable(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be listed ({error.strerror}); check the directory")

    # Whatever they are called: the index of a checkpoint may name its files as it likes.
    shards = set(read_weight_map(source).values()) if (source / INDEX_FILE).exists() else set()
    for directory, subdirectories, names in os.walk(source, onerror=unreadable):
        for name in list(subdirectories):
            path = Path(directory, name)
            if reason := _reason_to_skip_directory(source, path):
                skipped.append(SkippedFile(f"{path.relative_to(source).as_posix()}/", reason))
                subdirectories.remove(name)
        for name in names:
            path = Path(directory, name)
            relative = path.relative_to(source).as_posix()
            if reason := _WEIGHTS if relative in shards else _reason_to_skip_file(source, path, carried):
                skipped.append(SkippedFile(relative, reason))
            else:
                copied.append(relative)
    return Companions(tuple(sorted(copied)), tuple(sorted(skipped, key=lambda skip: skip.path)))


def copy_companions(source: Path, destination: Path, carried: Collection[str] = ()) -> Companions:
    """Copy the companion files of `source` into directory `destination`, links replaced by what they point to.

    Raises:
        CheckpointError: as for `list_companions`, before anything is written, or a file changes meanwhile.
        OutputError: a file cannot be copied.
    """
    companions = list_companions(source, carried)
    watched = WatchedFiles(source, companions.copied)
    for relative in companions.copied:
        try:
            (destination / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, destination / relative)
        except OSError as error:
            raise OutputError(
                f"{source / relative} cannot be copied to {destination} ({error.strerror}); check both"
            ) from None
    watched.require_unchanged()
    return companions


def _reason_to_skip_directory(source: Path, path: Path) -> str | None:
    if reason := _reason_by_name(f"{path.name}/"):
        return reason
    if path.is_symlink():
        require_inside(source, path)
        return "a link to a directory that is carried along by itself"
    return None


def _reason_to_skip_file(source: Path, path: Path, carried: Collection[str]) -> str | None:
    if path.parent == source and (reason := dict(_REWRITTEN).get(path.name)):
        return reason
    wanted = path.parent == source and path.name in carried
    if not wanted and (reason := _reason_by_name(path.name)):
        return reason
    real = require_inside(source, path)
    if not real.is_file():
        return "not a regular file"
    return None if wanted else _reason_by_name(real.name)


def _reason_by_name(name: str) -> str | None:
    return next((reason for pattern, reason in _LEFT_BEHIND if fnmatchcase(name, pattern)), None)
