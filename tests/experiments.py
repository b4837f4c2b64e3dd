"""Small experiments: recipes whose runs take a second or less."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gdagrow.experiment.recipe import read_experiment
from gdagrow.experiment.runs import Experiment

CONFIG: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 8, "num_noise_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 32, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def experiment(**changes: Any) -> dict[str, Any]:
    """A model, its growth by signal heads, and a growth of as many parameters; changed at the top."""
    return {
        "title": "Growth", "question": "Which?",
        "texts": {"code": {"documents": "{stdlib}/email/*.py", "held_out": 0.2}},
        "base": {
            "model": {"config": dict(CONFIG)}, "context_length": 32, "batch_size": 4, "steps": 12,
            "optimizer": {"learning_rate": 3e-3}, "schedule": {"kind": "wsd", "warm_up": 2, "decay": 3},
            "save_every": 4, "evaluate_every": 4, "evaluate_on": 8, "log_every": 2, "health_every": 2, "device": "cpu",
        },
        "seeds": [0, 1], "planned": {"sd": 0.01}, "grow_at": 4,
        "arms": {
            "none": {"told": "no growth"},
            "signal": {"told": "signal x2", "from": "none", "growth": {"expand": {"signal": 2}}},
            "uniform": {"told": "uniform x2", "from": "none", "growth": {"expand": {"uniform": 2}}},
        },
        "comparisons": [
            {"told": "Growth", "matched": "tokens", "reference": "none", "arms": ["signal", "uniform"]}
        ],
        **changes,
    }  # fmt: skip


def write_experiment(path: Path, **changes: Any) -> Path:
    """Write such a recipe as YAML."""
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(experiment(**changes), file)
    return path


def planned(directory: Path, **changes: Any) -> Experiment:
    """Such an experiment in `out` in a directory; nothing is there yet."""
    return Experiment.planned(
        read_experiment(write_experiment(directory / "recipe.yaml", **changes)), directory / "out"
    )


def with_arms(**arms: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arms of `experiment` with others, or without those that are None."""
    every = {**experiment()["arms"], **arms}
    return {"arms": {name: arm for name, arm in every.items() if arm is not None}}
