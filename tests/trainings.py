"""Small training runs: recipes of a model that learns something of Python's own library within seconds."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

# 2 layers, hidden 32: 3 signal heads to a noise head.
CONFIG: Mapping[str, Any] = {
    "model_type": "motif", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32, "hidden_act": "poly_norm",
    "tie_word_embeddings": False,
}  # fmt: skip


def recipe(**changes: Any) -> dict[str, Any]:
    """A run of 12 steps on one file, changed at the top."""
    return {
        "model": {"config": dict(CONFIG)},
        "data": {"train": "{stdlib}/argparse.py", "held_out": 0.1},
        "context_length": 32, "batch_size": 8, "steps": 12, "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warm_up": 2}, "save_every": 4, "log_every": 1, "evaluate_every": 6, "evaluate_on": 16,
        "device": "cpu", **changes,
    }  # fmt: skip


def write_recipe(path: Path, **changes: Any) -> Path:
    """Write such a run as YAML."""
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(recipe(**changes), file)
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without what differs from run to run."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]


def losses(run: Path) -> dict[int, float]:
    """The training loss by step."""
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def names(directory: Path) -> list[str]:
    """What is in a directory, numbers in their order."""
    return sorted((path.name for path in directory.iterdir()), key=lambda name: re.sub(r"\d+", _padded, name))


def _padded(found: re.Match[str]) -> str:
    return found.group().zfill(6)
