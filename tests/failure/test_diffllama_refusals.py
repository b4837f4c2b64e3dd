"""What is refused of a DiffLlama checkpoint, through the command line: one sentence, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_checkpoint
from tests.diffllama import TOPOLOGIES, save_diffllama
from tests.failure.test_cli_refusals import edit_config, require_refusal

RATIO = (
    "the ratio would become {}:1, and the diffllama layout has 1:1 alone; grow signal and noise by the same factor, "
)
RATIO += "or convert the checkpoint as well with --to motif (to: motif in a recipe)"

GROWTHS = {
    "signal alone": ("--signal-x2", RATIO.format(2)),
    "signal more than noise": ("--signal-x6 --noise-x2 --kv-x2", RATIO.format(3)),
    "ratio": ("--ratio 4:1 --hidden-x2", RATIO.format(4)),
    "noise alone": ("--noise-x2", "signal x1 with noise x2: 4 signal heads do not divide into 8 groups"),
    "ratio as it is": ("--ratio 1:1", "nothing would grow: the source already has the ratio 1:1"),
    "unknown layout": ("--to llama", "--to: input should be 'motif', got 'llama'"),
    "no layout": ("--to", "option '--to' requires an argument"),
    "nothing": ("", "growth: no growth asked for"),
}

KV = "num_key_value_heads {}: expected an even divisor of the 8 attention heads (a signal key and a noise key for each"
CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "odd KV heads": ({"num_key_value_heads": 1}, KV.format(1)),
    "KV heads that do not divide": ({"num_key_value_heads": 6}, KV.format(6)),
    "odd heads": ({"num_attention_heads": 5, "num_key_value_heads": None}, "num_key_value_heads 5: expected an even"),
    "odd head_dim": ({"head_dim": 5}, "head_dim 5: expected an even number, because RoPE turns pairs"),
    "activation": ({"hidden_act": "gelu"}, "config.json: hidden_act: expected silu, got 'gelu'"),
    "flags": (
        {"attention_bias": "no", "tie_word_embeddings": 1},
        "config.json: attention_bias: expected true or false, got 'no'; tie_word_embeddings: expected true or false, "
        "got 1",
    ),
    "eps": ({"rms_norm_eps": None}, "config.json: rms_norm_eps: expected a number between 0 and 1, got None"),
    "all that is wrong": (
        {"hidden_size": 0, "vocab_size": None, "num_hidden_layers": True, "head_dim": 2.5, "hidden_act": None},
        "config.json: hidden_size: expected a whole number of 1 or more, got 0; vocab_size: expected a whole number of "
        "1 or more, got None; num_hidden_layers: expected a whole number of 1 or more, got True; head_dim: expected a "
        "whole number of 1 or more, got 2.5; hidden_act: expected silu, got None",
    ),
    "biases that are not stored": ({"attention_bias": True}, "missing model.layers.0.self_attn.q_proj.bias"),
    "heads of another shape": (
        {"num_key_value_heads": 8},
        "model.layers.0.self_attn.k_proj.weight has shape [16, 32], expected [32, 32] ((2 kv head_dim) <- hidden)",
    ),
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_diffllama(tmp_path / "model", TOPOLOGIES[1], dtype=torch.bfloat16)
    return tmp_path / "model"


@pytest.mark.parametrize("case", GROWTHS)
def test_a_growth_that_cannot_be(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, sentence = GROWTHS[case]
    require_refusal(capsys, model.parent, sentence, "expand", model, *flags.split())
    require_refusal(capsys, model.parent, sentence, "plan", model, *flags.split())


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_makes_no_sense(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, sentence = CONFIGS[case]
    edit_config(model, **keys)
    for words in (("expand", model, "--uniform-x2"), ("expand", model, "--to", "motif"), ("inspect", model),
                  ("diff", model, model), ("diff", model, model, "--weights")):  # fmt: skip
        require_refusal(capsys, model.parent, sentence, *words)


def test_a_motif_source_has_nothing_to_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    sentence = f"to motif: {tmp_path}/model has the motif layout already; leave it out"
    require_refusal(capsys, tmp_path, sentence, "expand", tmp_path / "model", "--to", "motif")
    require_refusal(capsys, tmp_path, sentence, "expand", tmp_path / "model", "--to", "motif", "--signal-x2")


def test_scaled_rope_can_be_grown_but_not_converted_or_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    sentence = "config.json: RoPE is {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 10000.0}, expected rope_type "
    sentence += "default with a rope_theta, which is all that Motif's layout has"
    require_refusal(capsys, model.parent, sentence, "expand", model, "--to", "motif")
    require_refusal(capsys, model.parent, sentence, "diff", model, model)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.subln.weight", "model.layers.1.self_attn.q_proj.bias"])
def test_a_tensor_that_transformers_would_not_read(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Motif's table has rows for both; the source is held against its own."""
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: torch.ones(32)}, model / "model.safetensors")
    sentence = f"1 tensors do not fit the diffllama table at the sizes in config.json: unknown {name}"
    for words in (("expand", model, "--to", "motif"), ("inspect", model), ("diff", model, model)):
        require_refusal(capsys, model.parent, sentence, *words)


def test_a_lambda_that_no_conversion_can_read(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.self_attn.lambda_q1"
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: tensors[name].to(torch.int8)}, model / "model.safetensors")
    sentence = f"{name} is stored as I8, expected one of F64, F32, BF16, F16"
    require_refusal(capsys, model.parent, sentence, "expand", model, "--to", "motif")


def test_a_model_of_another_kind_is_no_growth_of_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(model.parent / "motif", groups=4, ratio=1, kv_groups=2, head_dim=4, layers=2, vocab=40)
    sentence = "have architecture motif and diffllama, which growth never changes"
    require_refusal(capsys, model.parent, sentence, "diff", model.parent / "motif", model, "--weights")


def test_a_recipe_file_that_converts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = model.parent / "recipe.yaml"
    recipe.write_text("to: Motif\n")
    sentence = f"recipe {recipe}: to: input should be 'motif', got 'Motif'"
    require_refusal(capsys, model.parent, sentence, "plan", model, "--recipe", recipe)
    assert json.loads((model / "config.json").read_text())["model_type"] == "diffllama"
