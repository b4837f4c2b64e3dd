"""What docs/transformers.md shows is true: its Python runs, and its evaluation finds grown and source the same."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gdagrow.formats.byte_tokenizer import write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.e2e.test_docs import ROOT, commands
from tests.growths import grow

PAGE = ROOT / "docs" / "transformers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# What the page shows for the source, then the command that it shows for the grown model, in one process.
EVALUATE = """
import json, sys
{block}
print("SOURCE", json.dumps(found["results"], default=float))
sys.argv = ["lm_eval", *{words!r}]
{code}
"""

TASKS: dict[str, dict[str, Any]] = {
    "python_bytes": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{start}}{{ends[0]}}",
                     "metric_list": [{"metric": "byte_perplexity"}]},
    "python_lines": {"output_type": "multiple_choice", "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}",
                     "doc_to_target": "right", "target_delimiter": "",
                     "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "python_rest": {"output_type": "generate_until", "doc_to_text": "{{start}}", "doc_to_target": "{{ends[0]}}",
                    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
                    "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a model of bytes and what it was grown into."""
    write_checkpoint(tmp_path / "demo" / "source", vocab=256, lambda_dtype=torch.float32, extra={}, scale=0.1)
    write_byte_tokenizer(tmp_path / "demo" / "source", 128)
    grow(tmp_path / "demo" / "source", tmp_path / "demo" / "grown", {"signal": 2})
    return tmp_path


def run(place: Path, code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=120,
        env={**os.environ, **OFFLINE, "HF_HOME": str(place / "home")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_python_of_the_page_runs(place: Path) -> None:
    out = run(place, "\n".join(block for block in BLOCKS if "lm_eval" not in block))
    assert out.startswith("import os")
    assert (place / "demo" / "saved" / "model.safetensors").exists()
    # Embedding, head and seven projections in each of two layers; four lambdas and six norms and their like in each.
    assert out.splitlines()[-1] == "16 matrices decayed, 19 vectors not"


def test_the_harness_gives_source_and_grown_the_same_figures(place: Path) -> None:
    lines = [line for line in Path(os.__file__).read_text().splitlines() if line.isascii() and 30 <= len(line) <= 60]
    (place / "tasks").mkdir()
    with (place / "tasks" / "lines.jsonl").open("w") as file:
        for line in lines[:24]:
            ends = [line[15:], line[15:][::-1], line[15:].upper()]
            file.write(json.dumps({"start": line[:15], "ends": ends, "right": 0}) + "\n")
    for name, task in TASKS.items():
        data = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "tasks/lines.jsonl"}}}
        (place / "tasks" / f"{name}.yaml").write_text(json.dumps({**data, "test_split": "test", **task}))
    (block,) = [block for block in BLOCKS if "lm_eval" in block]
    (line,) = [line for line in commands(PAGE) if "lm_eval" in line]
    _, _, code, *words = shlex.split(line)
    out = run(place, EVALUATE.format(block=block, words=words, code=code))
    (told,) = [line.removeprefix("SOURCE ") for line in out.splitlines() if line.startswith("SOURCE ")]
    (path,) = (place / "results" / "demo__grown").glob("results_*.json")
    source, grown = figures(json.loads(told)), figures(json.loads(path.read_text())["results"])
    assert source.keys() == grown.keys() == TASKS.keys()
    assert source["python_lines"] == grown["python_lines"]
    assert source["python_rest"] == grown["python_rest"]
    # Float64 logits that agree to 1e-11 of the largest, over the bytes of a line; a model that knows nothing has 256.
    perplexity = source["python_bytes"]["byte_perplexity,none"]
    assert perplexity > 100
    assert grown["python_bytes"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-9)


def figures(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {task: {k: v for k, v in found.items() if isinstance(v, float)} for task, found in results.items()}
