"""The commands that make a directory, on checkpoints small enough to be made again for every call that they make."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.checkpoints import write_checkpoint, write_distributed_state, write_training_state

SIZES = {"hidden": 16, "ffn": 16, "vocab": 24, "layers": 1, "groups": 1, "head_dim": 4}
GROWTH = ("--hidden-x2", "--ffn-x2")
TARGET = "made"


@dataclass(frozen=True)
class Case:
    """A command that makes `made` of `source`.

    write: Writes the source, a directory that is missing.
    command: What is typed before the two directories.
    flags: And behind them.
    """

    name: str
    write: Callable[[Path], None]
    command: str
    flags: tuple[str, ...]

    def words(self, directory: Path) -> tuple[str, ...]:
        """The command line in a directory that holds both."""
        return self.command, str(directory / "source"), str(directory / TARGET), *self.flags, "--quiet"


def _weights(directory: Path, dtype: torch.dtype) -> None:
    write_checkpoint(directory, **SIZES, dtype=dtype, max_shard_bytes=2000, companions=True)
    keep = {"tokenizer.json", "assets"}
    for path in directory.iterdir():
        if path.suffix != ".safetensors" and path.name not in keep and not path.name.startswith(("config", "model.")):
            path.unlink()


def _shards(directory: Path) -> None:
    _weights(directory, torch.bfloat16)


def _shards_of_float32(directory: Path) -> None:
    _weights(directory, torch.float32)


def _one_file(directory: Path) -> None:
    write_checkpoint(directory, **SIZES, dtype=torch.float32, extra={})


def _trainer(directory: Path) -> None:
    write_training_state(directory, **SIZES)


def _distributed(directory: Path) -> None:
    model = directory.with_name("model")
    write_checkpoint(model, **SIZES, dtype=torch.float32)
    write_distributed_state(model, directory)
    shutil.move(model / "config.json", directory / "config.json")
    shutil.rmtree(model)


SHARDS = Case("expand, shards and companions", _shards, "expand", (*GROWTH, "--max-shard-size", "9kB"))
SHARDS_FLOAT32 = Case(
    "the same, float32, exact copies", _shards_of_float32, "expand",
    (*GROWTH, "--max-shard-size", "12kB", "--exact-copies"),
)  # fmt: skip
ONE_FILE = Case("expand, one file", _one_file, "expand", GROWTH)
TRAINER = Case("expand with optimizer.pt", _trainer, "expand", GROWTH)
DISTRIBUTED = Case("expand of a distributed checkpoint", _distributed, "expand", (*GROWTH, "--max-shard-size", "40kB"))
TO_DCP = Case("convert to dcp", _shards, "convert", ("--to", "dcp"))
TO_SAFETENSORS = Case("convert to safetensors", _distributed, "convert", ("--to", "safetensors"))
EXPORT = Case("export", _shards, "export", ())
EXPORT_WITH_CODE = Case("export with code", _one_file, "export", ("--with-code",))


def require_readable(made: Path) -> None:
    """Read all of a directory with readers that are not gdagrow's, and hold it against the hashes that it records."""
    for path in made.rglob("*.json"):
        json.loads(path.read_bytes())
    for path in made.rglob("*.safetensors"):
        assert load_file(path), path
    for path in made.rglob("*.pt"):
        assert torch.load(path, weights_only=True), path
    if (made / ".metadata").exists():
        tensors = torch.distributed.checkpoint.FileSystemReader(made).read_metadata().state_dict_metadata
        assert tensors, made
    if (made / "growth.json").exists():
        recorded = json.loads((made / "growth.json").read_bytes())["output"]["files"]
        assert recorded, made
        for name, digest in recorded.items():
            octets = (made / name).read_bytes()
            assert (len(octets), hashlib.sha256(octets).hexdigest()) == (digest["bytes"], digest["sha256"]), name
