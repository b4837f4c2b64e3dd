"""The demo trainer as a user runs it: a complete directory, loadable, with the dtypes that it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdagrow.models.gda import load_model
from gdagrow.train.demo import CONFIG, standard_library_text


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gdagrow.train.demo", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out_dir = tmp_path_factory.mktemp("demo") / "new" / "model"
    result = demo(str(out_dir), "--seconds", "5")
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


def test_directory_is_complete_and_nothing_lies_beside_it(trained: tuple[Path, str]) -> None:
    out_dir, _ = trained
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(out_dir.parent.iterdir()) == [out_dir]
    assert json.loads((out_dir / "config.json").read_text()) == CONFIG


def test_weights_are_bf16_and_lambdas_float32(trained: tuple[Path, str]) -> None:
    tensors = load_file(trained[0] / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if ".lambda_" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if ".lambda_" not in name} == {torch.bfloat16}


def test_it_learned_and_says_so(trained: tuple[Path, str]) -> None:
    out_dir, output = trained
    found = re.search(r"validation loss ([\d.]+) nats/byte, bigram baseline ([\d.]+) nats/byte", output)
    assert found, output
    loss, bigram = map(float, found.groups())
    # Knowing nothing costs log(256) = 5.55. Three steps, all that a busy machine may make of the time, come to 5.0.
    assert loss < 5.3
    # Python source by its bigrams, the library of any version: 2.4.
    assert 2.0 < bigram < 3.0
    assert f"wrote {out_dir}" in output


def test_the_checkpoint_runs_as_stored(trained: tuple[Path, str]) -> None:
    logits, loss = load_model(trained[0])(torch.tensor([list(b"import os\n")]), torch.tensor([list(b"import os\n")]))
    assert logits.shape == (1, 10, 256)
    assert logits.dtype == torch.bfloat16
    assert loss is not None
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_target_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "taken"
    target.write_text("mine") if kind == "file" else (target / "sub").mkdir(parents=True)
    result = demo(str(target), "--seconds", "600")
    assert result.returncode == 2
    reason = "exists and is not a directory" if kind == "file" else "exists and is not empty"
    assert result.stderr == f"error: {target} {reason}; remove it or choose another output\n"
    assert result.stdout == ""


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_budget_that_is_no_time_is_refused(tmp_path: Path, seconds: str) -> None:
    result = demo(str(tmp_path / "out"), f"--seconds={seconds}")
    assert result.returncode == 2
    assert f"--seconds is {float(seconds):g}, expected a positive number" in result.stderr


def test_text_is_split_by_file_and_the_same_each_time() -> None:
    training, validation = standard_library_text()
    again, _ = standard_library_text()
    assert torch.equal(training, again)
    assert training.dtype == torch.uint8
    assert 10 * len(validation) < len(training) < 40 * len(validation)
