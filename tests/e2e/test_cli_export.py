"""`gdagrow export`: what it writes, that strangers can run it without gdagrow, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gdagrow import export as export_module
from gdagrow.errors import OutputError
from gdagrow.export import export
from gdagrow.formats.safetensors_header import read_header
from gdagrow.models.gda import load_model
from tests.checkpoints import COMPANIONS, TRAINING_STATE, listing, write_checkpoint, write_files
from tests.command import call
from tests.diffllama import TOPOLOGIES, save_diffllama
from tests.growths import grow

CODE = {
    "gdagrow_config.py", "gdagrow_errors.py", "gdagrow_hf_config.py", "gdagrow_hf_layers.py", "gdagrow_hf_model.py",
    "gdagrow_hf_stored.py", "gdagrow_kernels.py", "gdagrow_lambda_init.py", "gdagrow_layers.py",
}  # fmt: skip

# A process that cannot import gdagrow loads the directory, computes forward and backward, generates and saves.
STRANGER = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gdagrow", "gdagrow_cli"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(12).view(2, 6)
outputs = model(ids, labels=ids)
outputs.loss.backward()
exact = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float64)
generated = exact.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=60)
model.save_pretrained(sys.argv[2])
print(json.dumps({"class": type(model).__module__, "logits": outputs.logits.double().tolist(),
                  "generated": generated.tolist(), "loaded": "gdagrow" in sys.modules}))
"""


def as_a_stranger(directory: Path, saved: Path, home: Path) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(directory), str(saved)], capture_output=True, text=True, timeout=100,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HOME": str(home)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_a_grown_model_with_code_runs_without_gdagrow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", lambda_dtype=torch.float32, extra={}, bias=True)
    grow(tmp_path / "source", tmp_path / "grown", {"signal": 2})
    outcome = call(capsys, "export", tmp_path / "grown", tmp_path / "out", "--with-code")
    assert outcome.code == 0, outcome.err
    assert f"from_pretrained('{tmp_path / 'out'}', trust_remote_code=True)" in outcome.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "growth.json", "model.safetensors", *CODE,
    }  # fmt: skip
    found = as_a_stranger(tmp_path / "out", tmp_path / "saved", tmp_path / "home")
    assert found["class"].startswith("transformers_modules.")
    assert found["loaded"] is False
    model, ids = load_model(tmp_path / "grown"), torch.arange(12).view(2, 6)
    assert torch.equal(torch.tensor(found["logits"], dtype=torch.float64), model(ids).logits.double())
    model = model.double()
    for _ in range(4):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert found["generated"] == ids.tolist()
    # What the stranger saved has the code again, and is a checkpoint of ours.
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= CODE
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("grown", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert call(capsys, "export", tmp_path / "saved", tmp_path / "again", "--with-code").code == 0


def test_without_code_everything_but_training_state_is_copied_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", max_shard_bytes=20000, companions=True)
    published = listing(tmp_path / "source")
    write_files(tmp_path / "source", TRAINING_STATE)
    outcome = call(capsys, "export", tmp_path / "source", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    assert listing(tmp_path / "out") == published
    told = json.loads(outcome.out)
    assert told.pop("seconds") >= 0
    shards = sorted(name for name in published if name.endswith(".safetensors"))
    assert len(shards) > 2
    assert told == {
        "output": str(tmp_path / "out"), "code": [], "left_behind": sorted(TRAINING_STATE),
        "copied": sorted({*COMPANIONS, "model.safetensors.index.json"}),
        "files": {name: {"bytes": (tmp_path / "source" / name).stat().st_size} for name in shards},
    }  # fmt: skip


def test_quiet_is_quiet_and_progress_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source")
    assert call(capsys, "export", tmp_path / "source", tmp_path / "quiet", "--quiet").out == ""
    written: list[int] = []
    export(read_header(tmp_path / "source"), tmp_path / "out", with_code=False, progress=written.append)
    assert sum(written) == (tmp_path / "source" / "model.safetensors").stat().st_size


def test_the_code_has_no_import_of_gdagrow_left(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", extra={})
    export(read_header(tmp_path / "source"), tmp_path / "out", with_code=True)
    for path in (tmp_path / "out").glob("*.py"):
        text = path.read_text()
        assert "import gdagrow" not in text
        assert "from gdagrow" not in text, path.name
        assert text.startswith("# Of gdagrow "), path.name


def test_refusals_are_one_sentence_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source")
    save_diffllama(tmp_path / "llama", TOPOLOGIES[0], dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "scaled", extra={"rope_scaling": {"type": "linear", "factor": 2.0}})
    write_checkpoint(tmp_path / "there", extra={})
    before = listing(tmp_path)
    for words, sentence in (
        (("source", "out", "--with-code"), 'config.json names other code in auto_map ({"AutoModelForCausalLM": '),
        (("llama", "out", "--with-code"), "model_type is 'diffllama', which transformers loads by itself; leave"),
        (("scaled", "out", "--with-code"), "rope_scaling is {'type': 'linear', 'factor': 2.0}, which the reference"),
        (("source", "there"), f"{tmp_path / 'there'} exists and is not empty; remove it or choose another output"),
        (("source", "source/out"), f"lies in the source {tmp_path / 'source'}, which is never changed"),
        (("nowhere", "out"), "nowhere"),
    ):
        paths = [tmp_path / words[0], tmp_path / words[1], *words[2:]]
        outcome = call(capsys, "export", *paths)
        assert outcome.code == 2, words
        assert outcome.out == ""
        assert sentence in outcome.err
        assert outcome.err.count("\n") == 1
    assert listing(tmp_path) == before
    assert call(capsys, "export", tmp_path / "llama", tmp_path / "out").code == 0


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "source", max_shard_bytes=20000)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = listing(tmp_path)
    with pytest.raises(OutputError, match=r"cannot be copied to .* \(No space left on device\); check both"):
        export(read_header(tmp_path / "source"), tmp_path / "out", with_code=False, progress=full)
    assert listing(tmp_path) == before
    monkeypatch.setattr(export_module, "check_free_space", lambda *_: (_ for _ in ()).throw(OutputError("no room")))
    with pytest.raises(OutputError, match="no room"):
        export(read_header(tmp_path / "source"), tmp_path / "out", with_code=False)
    assert listing(tmp_path) == before
