"""Training in several processes: FSDP2 on CPUs by `torchrun`, grown, one killed, its states loaded by any number."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.command import call
from tests.ports import free_port
from tests.trainings import lines, losses, names, write_recipe

# Sums over two halves of a batch instead of one, in float32, through twelve steps: the noise of single roundings
# (6e-8) grown by a model whose loss falls by a sixth.
NOISE = 1e-5

# The first of several processes grows the parts of all.
GROWTH = {"at": 6, "expand": {"signal": 2, "hidden": 2}, "freeze": {"heads": "old", "steps": 2}}
GROWING: Mapping[str, Any] = {"growth": [GROWTH], "keep": 9, "multipliers": True, "health_every": 4}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also what a copy of this process can have
    yield
    torch.set_num_threads(threads)


def together(count: int, *words: object) -> list[int]:
    """Run a command line in copies of this process, as `torchrun` would start them but for what need not be imported.

    For runs that do not grow on the way: copies of a process cannot use the threads that it had.
    """
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [_copy({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, words) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _copy(environment: dict[str, str], words: tuple[object, ...]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        from gdagrow_cli.main import main

        signal.alarm(60)
        os.environ |= environment
        AcceleratorState._reset_state(reset_partial_state=True)  # of a run that the first process had done alone
        code = main([str(word) for word in words])
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    from gdagrow_cli.main import main

    directory = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(directory / "r.yaml", **GROWING)
    assert main(["train", str(recipe), "--out", str(directory / "run"), "--quiet"]) == 0
    return directory / "run"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def workers(launcher: int) -> list[int]:
    """The processes that a launcher started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by `torchrun` of which one process was killed, gone on with by two."""
    directory = tmp_path_factory.mktemp("sharded")
    recipe = write_recipe(directory / "r.yaml", **GROWING)
    words = ["train", str(recipe), "--out", str(directory / "run"), "--resume", "--quiet"]
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "-m", "gdagrow_cli.main", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for((directory / "run" / "checkpoint-8").exists)
    os.kill(workers(launched.pid)[-1], signal.SIGKILL)
    assert launched.wait(60) != 0
    assert not (directory / "run" / "model").exists()
    assert together(2, *words) == [0, 0]
    return directory / "run"


def assert_same_losses(run: Path, reference: Path) -> None:
    found, expected = losses(run), losses(reference)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=NOISE)
    held_out = [[line["eval_loss"] for line in lines(path) if "eval_loss" in line] for path in (run, reference)]
    assert held_out[0] == pytest.approx(held_out[1], rel=NOISE)


def test_two_processes_have_the_losses_of_one(sharded: Path, whole: Path) -> None:
    assert_same_losses(sharded, whole)
    parts = ["optimizer_0", "pytorch_model_fsdp_0", "rng_state_0.pth", "rng_state_1.pth"]
    rest = ["scheduler.pt", "trainer_state.json"]
    assert names(sharded / "checkpoint-4") == ["config.json", *parts, *rest]
    for grown in ("grown-6", "checkpoint-8"):
        assert names(sharded / grown) == ["config.json", "growth.json", *parts, *rest]
    assert set(names(whole / "model")) - set(names(sharded / "model")) == {"generation_config.json"}


def test_a_state_without_a_config_is_grown_with_that_of_the_model(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = shutil.copytree(sharded / "checkpoint-4", tmp_path / "state")
    (state / "config.json").unlink()
    assert call(capsys, "expand", state, tmp_path / "refused", "--signal-x2").code == 2
    given = ("--config", sharded / "checkpoint-4")
    outcome = call(capsys, "expand", state, tmp_path / "grown", "--signal-x2", *given, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    call(capsys, "expand", sharded / "checkpoint-4", tmp_path / "expected", "--signal-x2", "--quiet")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        files = names(tmp_path / "expected" / part)
        assert names(tmp_path / "grown" / part) == files
        assert all((tmp_path / "grown" / part / file).read_bytes() == (tmp_path / "expected" / part / file).read_bytes()
                   for file in files)  # fmt: skip


def test_the_loss_is_the_same_right_after_a_growth_of_parts(sharded: Path) -> None:
    before, after = (line["eval_loss"] for line in lines(sharded) if line["step"] == 6 and "eval_loss" in line)
    assert after == pytest.approx(before, rel=1e-6)


def test_health_is_that_of_the_whole(sharded: Path, whole: Path) -> None:
    health = [
        [line["copies"]["signal"]["cosine"] for line in lines(run) if "copies" in line] for run in (sharded, whole)
    ]
    assert len(health[0]) == 2
    assert health[0] == pytest.approx(health[1], rel=NOISE)


def test_every_process_holds_its_part(sharded: Path) -> None:
    stored = FileSystemReader(sharded / "checkpoint-4" / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    chunks = {name: [list(chunk.sizes) for chunk in stored[name].chunks] for name in stored}
    assert chunks["model.model.embed_tokens.weight"] == [[128, 32]] * 2


@pytest.mark.parametrize(
    ("source", "gone", "count"),
    [
        ("sharded", ["checkpoint-8", "checkpoint-12"], 1),
        ("whole", ["checkpoint-12"], 2),
    ],
)
def test_a_state_is_gone_on_with_by_another_number(
    source: str, gone: list[str], count: int, whole: Path, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(request.getfixturevalue(source), tmp_path / "run")
    for name in [*gone, "model"]:
        shutil.rmtree(tmp_path / "run" / name)
    words = ["train", write_recipe(tmp_path / "r.yaml", **GROWING), "--out", tmp_path / "run", "--resume", "--quiet"]
    if count == 1:
        assert call(capsys, *words).code == 0
    else:
        assert together(count, *words) == [0] * count
    assert_same_losses(tmp_path / "run", whole)


def test_a_run_that_got_deeper_in_one_process_is_gone_on_with_by_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of new blocks its optimizer has nothing yet, which sharded ones need; small tensors are in float64."""
    kept = {"layers": "old", "steps": 2}
    changes = {"growth": [{"at": 4, "expand": {"depth": 2, "insert": "bottom"}, "freeze": kept}], "save_every": 8}
    recipe = write_recipe(tmp_path / "r.yaml", **changes, keep=9, steps=8)
    assert call(capsys, "train", recipe, "--out", tmp_path / "one", "--quiet").code == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("checkpoint-8", "model"):
        shutil.rmtree(tmp_path / "two" / name)
    assert together(2, "train", recipe, "--out", tmp_path / "two", "--resume", "--quiet") == [0, 0]
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert together(2, "train", recipe, "--out", tmp_path / "new", "--quiet") == [2, 2], (
        "a growth that is still to come"
    )
    assert not (tmp_path / "new").exists()


def test_a_batch_that_does_not_divide_is_refused_by_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    assert together(3, "train", recipe, "--out", tmp_path / "run") == [2, 2, 2]
    assert capfd.readouterr().err == (
        "error: batch_size 8 does not divide into 3 processes with one or more sequences at once; change batch_size or "
        "micro_batch_size\n"
    )


def test_bf16_and_tied_embeddings_in_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held against one process: bf16 has 8 bits, so that losses agree to some parts in 256 of what they fell by."""
    from tests.trainings import CONFIG

    changes = {"model": {"config": {**CONFIG, "tie_word_embeddings": True}}, "precision": "bf16", "steps": 6,
               "gradient_checkpointing": True, "evaluate_every": 0, "device": "auto"}  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", **changes)
    assert call(capsys, "train", recipe, "--out", tmp_path / "one", "--quiet").code == 0
    assert together(2, "train", recipe, "--out", tmp_path / "two", "--quiet") == [0, 0]
    one, two = list(losses(tmp_path / "one").values()), list(losses(tmp_path / "two").values())
    assert two == pytest.approx(one, rel=5e-3)
    assert two[5] < two[0] - 0.2
