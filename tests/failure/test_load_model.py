"""`load_model` gives back what `save_model` wrote, and refuses in one sentence whatever is no Motif checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdagrow.errors import CheckpointError
from gdagrow.models.gda import GdaConfig, GdaModel, init_weights, load_model, save_model

CONFIG: dict[str, Any] = {
    "model_type": "motif", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "num_noise_heads": 2, "head_dim": 4, "vocab_size": 30, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "hidden_act": "poly_norm", "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.arange(10).view(2, 5)


def written(directory: Path, bias: frozenset[str] = frozenset(), **config: Any) -> GdaModel:
    """A small model saved into `directory`: bf16 with float32 lambdas, as Motif has it."""
    model = GdaModel(GdaConfig.from_dict({**CONFIG, **config}), bias)
    init_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if ".lambda_" not in name:
            parameter.data = parameter.data.bfloat16()
    save_model(model, directory, {**CONFIG, **config})
    return model


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Change tensors of the saved file; keyword names have `__` for dots, None deletes."""
    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")


def shard(directory: Path) -> None:
    """Split the saved file in two with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = dict.fromkeys(names[:9], "a.safetensors") | dict.fromkeys(names[9:], "b.safetensors")
    save_file({name: tensors[name] for name in names[:9]}, directory / "a.safetensors")
    save_file({name: tensors[name] for name in names[9:]}, directory / "b.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    return str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [frozenset(), frozenset({"q_proj", "down_proj"})], ids=["bare", "biased"])
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_is_exact_to_the_bit(tmp_path: Path, tied: bool, bias: frozenset[str], sharded: bool) -> None:
    model = written(tmp_path, bias, tie_word_embeddings=tied)
    if sharded:
        shard(tmp_path)
    loaded = load_model(tmp_path)
    expected, got = model.state_dict(), loaded.state_dict()
    assert list(got) == list(expected)
    assert ("lm_head.weight" in got) is not tied
    assert ("model.layers.1.self_attn.q_proj.bias" in got) is bool(bias)
    assert all(got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]) for name in expected)
    assert {tensor.dtype for name, tensor in got.items() if ".lambda_" in name} == {torch.float32}
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_dtype_casts_everything(tmp_path: Path) -> None:
    written(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path, torch.float64).parameters()} == {torch.float64}


def test_a_loaded_model_does_not_follow_its_file(tmp_path: Path) -> None:
    written(tmp_path)
    model = load_model(tmp_path)
    before = model.model.norm.weight.detach().clone()
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert torch.equal(model.model.norm.weight, before)
    assert model.state_dict()["lm_head.weight"].isfinite().all()


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    written(tmp_path)
    rewrite(
        tmp_path,
        model__norm__weight=None,
        model__layers__0__self_attn__subln__weight=None,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2),
        model__layers__1__self_attn__q_proj__weight=torch.ones(3, 12),
        model__layers__1__mlp__up_proj__weight=torch.ones(20, 12, dtype=torch.int8),
    )
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: the weights are not those of config.json: ")
    assert sorted(message.split("config.json: ")[1].split("; ")) == [
        "model.layers.0.self_attn.rotary_emb.inv_freq is unexpected",
        "model.layers.0.self_attn.subln.weight is missing",
        "model.layers.1.mlp.up_proj.weight is I8, expected one of F64, F32, F16, BF16",
        "model.layers.1.self_attn.q_proj.weight has shape [3, 12], expected [32, 12]",
        "model.norm.weight is missing",
    ]


def test_a_bias_that_only_some_layers_have(tmp_path: Path) -> None:
    written(tmp_path, frozenset({"k_proj"}))
    rewrite(tmp_path, model__layers__1__self_attn__k_proj__bias=None)
    assert "config.json: model.layers.1.self_attn.k_proj.bias is missing" in refusal(tmp_path)


def test_a_directory_that_is_no_checkpoint_is_refused_as_everywhere(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    written(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert f"{path} is truncated: expected " in refusal(tmp_path)
