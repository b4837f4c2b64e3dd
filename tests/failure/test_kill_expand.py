"""`kill -9` at random moments of a larger expand: never a target that is not whole, and a rerun succeeds.

`test_faults.py` kills small ones at every call; here several blocks and threads are under way.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gdagrow.checkpoint import read_checkpoint
from gdagrow.formats.torch_file import read_torch_file
from gdagrow.reading import open_reader
from tests.checkpoints import write_checkpoint, write_distributed_state, write_training_state

ROOT = Path(__file__).parents[2]
NUM_KILLS = 8

# One process that has imported torch forks the expands, each a process of its own, so that eight cost no eight
# imports. It never starts a thread itself, which a fork would not survive.
FORKER = """
import os, signal, sys
from pathlib import Path
from gdagrow.expand import expand
from gdagrow.growing import prepare_growth
from gdagrow.recipe import make_recipe

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
source, target = map(Path, sys.argv[1:])
recipe = make_recipe({"hidden": 2, "ffn": 2})
prepare_growth(source, recipe)  # imports what it needs
print("ready", flush=True)
while sys.stdin.readline():
    child = os.fork()
    if not child:
        code = 1
        try:
            growing = prepare_growth(source, recipe, max_shard_bytes=40_000_000)
            expand(growing.plan, target, growing.output)
            code = 0
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until then the child keeps its number, even if it has ended
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Expands:
    """Runs of the same expand, one after the other."""

    def __init__(self, source: Path, target: Path) -> None:
        self.target = target
        self._forker = subprocess.Popen(
            [sys.executable, "-c", FORKER, source, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._read() == "ready"

    def start(self) -> int:
        """Start an expand; its process number."""
        return self._ask()

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return self._ask()

    def _ask(self) -> int:
        assert self._forker.stdin is not None
        self._forker.stdin.write("\n")
        self._forker.stdin.flush()
        return int(self._read())

    def _read(self) -> str:
        assert self._forker.stdout is not None
        return self._forker.stdout.readline().strip()

    def close(self) -> None:
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.close()
        self._forker.wait()
        self._forker.stdout.close()

    def partials(self) -> list[Path]:
        return [path for path in self.target.parent.iterdir() if "gdagrow-partial" in path.name]

    def num_bytes_written(self) -> int:
        # os.walk takes it when a directory is published, or a file removed, while it looks.
        found = (entry for partial in self.partials() for entry in os.walk(partial))
        return sum(size_of(Path(directory, file)) for directory, _, files in found for file in files)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # published meanwhile
        return 0


@pytest.fixture
def expands(tmp_path: Path) -> Iterator[Expands]:
    # 60 MB that grow to 160: by 4 in the matrices of two axes, by 2 in the embedding and the head.
    write_checkpoint(
        tmp_path / "source", hidden=512, ffn=2048, vocab=20000, layers=2, head_dim=64, dtype=torch.bfloat16,
        companions=True,
    )  # fmt: skip
    running = Expands(tmp_path / "source", tmp_path / "grown")
    yield running
    running.close()


def require_whole(directory: Path) -> None:
    """Everything that the record names is there with the recorded hash, and safetensors' own reader reads it all."""
    record = json.loads((directory / "growth.json").read_text())
    shards = {path.name for path in directory.glob("*.safetensors")}
    assert shards == set(record["output"]["files"])
    assert len(shards) > 1
    names = set()
    for shard, digest in record["output"]["files"].items():
        content = (directory / shard).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (digest["bytes"], digest["sha256"])
        with safe_open(directory / shard, framework="pt") as file:
            names |= {name for name in file.keys() if file.get_tensor(name).numel()}  # noqa: SIM118
    assert names == set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])
    assert json.loads((directory / "config.json").read_text())["hidden_size"] == 1024
    assert (directory / "tokenizer.json").exists()


def remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()


def test_killed_at_any_moment(expands: Expands) -> None:
    began = time.monotonic()
    expands.start()
    assert expands.wait() == 0
    duration = time.monotonic() - began
    require_whole(expands.target)
    remove(expands.target)

    moments = random.Random(0)
    killed = interrupted = 0
    for _ in range(NUM_KILLS):
        child = expands.start()
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        ended = expands.wait()
        assert ended in (0, -signal.SIGKILL)
        killed += ended != 0
        if ended == 0:
            duration *= 0.8  # faster than the first, which may have found cold caches
        # A run removes what killed ones left, so there is never more than one.
        assert len(expands.partials()) <= 1
        if expands.target.exists():
            require_whole(expands.target)
            remove(expands.target)
        else:
            assert ended == -signal.SIGKILL
            interrupted += len(expands.partials())
    assert killed >= NUM_KILLS / 2, "hardly a run was killed; the moments are wrong"
    assert interrupted >= NUM_KILLS / 4, "hardly a run was killed while it wrote"

    expands.start()
    assert expands.wait() == 0
    require_whole(expands.target)
    assert expands.partials() == []


@pytest.mark.parametrize("num_bytes", [1, 50_000_000])
def test_interrupted_from_the_keyboard(expands: Expands, num_bytes: int) -> None:
    """Ctrl-C leaves nothing behind."""
    began = time.monotonic()
    child = expands.start()
    while expands.num_bytes_written() < num_bytes:
        assert time.monotonic() - began < 60, "nothing is written"
    os.kill(child, signal.SIGINT)
    assert expands.wait() == 130
    assert expands.partials() == []
    assert not expands.target.exists()


# Weights and moments that grow to 168 MB, a third of it weights.
SIZES = {"hidden": 256, "ffn": 1024, "vocab": 6000, "layers": 2, "head_dim": 64, "dtype": torch.float32}


def run_of_the_trainer(directory: Path) -> None:
    write_training_state(directory, **SIZES)


def distributed_state(directory: Path) -> None:
    write_checkpoint(directory.with_name("model"), **SIZES)
    write_distributed_state(directory.with_name("model"), directory)
    (directory / "config.json").write_bytes(directory.with_name("model").joinpath("config.json").read_bytes())


def require_whole_state(directory: Path, kind: str) -> None:
    """Everything that the record names has the recorded hash, and is what is there; weights and moments are read."""
    recorded = json.loads((directory / "growth.json").read_text())["output"]["files"]
    for file, digest in recorded.items():
        assert hashlib.sha256((directory / file).read_bytes()).hexdigest() == digest["sha256"]
    written = {path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".pt", ".distcp")}
    assert set(recorded) == written - {"scheduler.pt"}
    header = read_checkpoint(directory)
    with open_reader(header) as reader:
        assert all(reader.tensor(name).shape == info.shape for name, info in header.tensors.items())
    if kind == "trainer":
        assert len(read_torch_file(directory / "optimizer.pt")["state"]) == len(header.tensors)
        assert (directory / "scheduler.pt").exists()
        assert (directory / "trainer_state.json").exists()
    else:
        assert len(header.moments) == 3 * len(header.tensors)


@pytest.mark.parametrize(("kind", "write"), [("trainer", run_of_the_trainer), ("dcp", distributed_state)])
def test_a_training_state_killed_at_any_byte(tmp_path: Path, kind: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / "source")
    expands = Expands(tmp_path / "source", tmp_path / "grown")
    try:
        expands.start()
        assert expands.wait() == 0
        require_whole_state(expands.target, kind)
        total = sum(map(size_of, expands.target.iterdir()))
        assert total > 150_000_000
        remove(expands.target)
        moments = random.Random(1)
        killed = 0
        for _ in range(4):
            child, stop_at, began = expands.start(), moments.uniform(0, total), time.monotonic()
            while expands.num_bytes_written() < stop_at and not expands.target.exists():
                assert time.monotonic() - began < 60, "nothing is written"
            os.kill(child, signal.SIGKILL)
            ended = expands.wait()
            killed += ended == -signal.SIGKILL and not expands.target.exists()
            if expands.target.exists():
                require_whole_state(expands.target, kind)
                remove(expands.target)
        assert killed >= 2, "hardly a run was killed while it wrote"
        expands.start()
        assert expands.wait() == 0
        require_whole_state(expands.target, kind)
        assert expands.partials() == []
    finally:
        expands.close()
