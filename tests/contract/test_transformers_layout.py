"""The model as `transformers` loads and writes it: the names, shapes, order, dtypes and config keys of the layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from gdagrow.errors import CheckpointError
from gdagrow.models.gda import GdaModel, load_model
from gdagrow.models.hf import MotifConfig, MotifForCausalLM
from gdagrow.verify.settings import other_settings
from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.diffllama import TOPOLOGIES, save_diffllama
from tests.growths import grow

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "float32 lambdas": {"lambda_dtype": torch.float32},
    "sharded": {"max_shard_bytes": 6000},
    "biases": {"bias": True},
    "tied": {"tied": True, "dtype": torch.float16},
    "silu": {"activation": "silu", "dtype": torch.float32},
    "plain differential": {"plain": True, "ratio": 1, "tied": True, "lambda_dtype": torch.float32},
    "float64": {"dtype": torch.float64},
}


def layout(model: torch.nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Every parameter in the order in which the model has them."""
    return [(name, parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def rewrite(directory: Path, **keys: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config_of(directory) | keys))


@pytest.fixture(params=list(CHECKPOINTS.values()), ids=list(CHECKPOINTS))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", **request.param)
    return tmp_path / "source"


def test_loaded_as_stored_without_remote_code(checkpoint: Path) -> None:
    """The parameters of the reference model in its order; the `auto_map` of the config names code that must not run."""
    model, reference = AutoModelForCausalLM.from_pretrained(checkpoint), load_model(checkpoint)
    assert type(model) is MotifForCausalLM
    assert layout(model) == layout(reference)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_written_as_read(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    before, after = stored(checkpoint), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    config, saved = config_of(checkpoint), config_of(tmp_path / "saved")
    assert {key: saved.get(key) for key in config} == config
    assert saved.keys() - config.keys() == {"architectures", "dtype", "transformers_version", "use_cache"}
    assert call(capsys, "diff", checkpoint, tmp_path / "saved", "--weights").code == 0


def test_what_was_saved_can_be_grown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", lambda_dtype=torch.float32, tied=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "saved")
    outcome = call(capsys, "expand", tmp_path / "saved", tmp_path / "grown", "--uniform-x2", "--exact-copies")
    assert outcome.code == 0, outcome.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "grown").save_pretrained(tmp_path / "again")
    outcome = call(capsys, "diff", tmp_path / "source", tmp_path / "again")
    assert outcome.code == 0, outcome.out


def test_both_spellings_of_the_type_load_and_stay(tmp_path: Path) -> None:
    for spelling in ("Motif", "motif"):
        write_checkpoint(tmp_path / spelling)
        rewrite(tmp_path / spelling, model_type=spelling)
        assert type(AutoConfig.from_pretrained(tmp_path / spelling)) is MotifConfig
        AutoModelForCausalLM.from_pretrained(tmp_path / spelling).save_pretrained(tmp_path / "saved" / spelling)
        assert config_of(tmp_path / "saved" / spelling)["model_type"] == spelling


def test_null_keys_and_rope_parameters_are_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    config = config_of(tmp_path / "source")
    theta = config.pop("rope_theta")
    keys = {
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_scaling": None,
        "eos_token_id": None,
    }
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | keys))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert model.config.gda.rope_theta == theta
    model.save_pretrained(tmp_path / "saved")
    saved = config_of(tmp_path / "saved")
    assert {key: saved.get(key, "absent") for key in keys} == keys
    assert other_settings(config | keys, saved) == ()


def test_a_generation_config_is_left_alone(tmp_path: Path) -> None:
    """transformers hands every keyword of `from_pretrained` to it, which then writes it."""
    write_checkpoint(tmp_path / "source", companions=True, bias=True, lambda_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written.keys() == {"do_sample", "transformers_version"}
    assert written["do_sample"] is True


def test_dtypes_that_are_asked_for(tmp_path: Path) -> None:
    """A wider dtype is everybody's; in a narrower one, what is stored wider than the embedding stays as it is."""
    write_checkpoint(tmp_path / "source", lambda_dtype=torch.float32)
    wide = {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
    for dtype in ("auto", None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
        narrow = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        assert model.dtype == narrow, dtype
        for name, parameter in model.named_parameters():
            is_wide = name.rpartition(".")[2] in wide
            assert parameter.dtype == (torch.promote_types(narrow, torch.float32) if is_wide else narrow), name
    assert {parameter.dtype for parameter in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_float64_lambdas_of_a_conversion_stay(tmp_path: Path) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[0], dtype=torch.bfloat16)
    grow(tmp_path / "source", tmp_path / "grown", {"to": "motif", "exact_copies": True})
    assert layout(AutoModelForCausalLM.from_pretrained(tmp_path / "grown")) == layout(load_model(tmp_path / "grown"))


def test_biases_exist_where_they_are_stored(tmp_path: Path) -> None:
    """`use_bias` is only the default of a model that is built from a config."""
    write_checkpoint(tmp_path / "source", bias=True, dtype=torch.float32)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(("q_proj.bias", "up_proj.bias"))}
    save_file(kept, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    for use_bias in (True, False):
        rewrite(tmp_path / "source", use_bias=use_bias)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        assert dict(model.named_parameters()).keys() == kept.keys()
        model.save_pretrained(tmp_path / f"saved-{use_bias}")
        assert stored(tmp_path / f"saved-{use_bias}").keys() == kept.keys()
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "source", use_bias=True))
    assert dict(built.named_parameters()).keys() == tensors.keys()


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """transformers alone would fill what is missing with random numbers, and say so in a report."""
    write_checkpoint(tmp_path / "source", tied=True)
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.lambda_k1"], tensors["model.norm.weight"]
    tensors["model.layers.1.self_attn.g_proj.weight"] = torch.zeros(2, 2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert str(error.value) == (
        f"{tmp_path / 'source'}: the weights are not those of config.json: model.layers.1.self_attn.lambda_k1 is "
        "missing; model.norm.weight is missing; model.layers.1.self_attn.g_proj.weight is unexpected; lm_head.weight "
        "is not the embedding, though tie_word_embeddings is true; restore the checkpoint"
    )


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"k_ratio": 2}, "config.json: k_ratio is 2, expected 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json: rope_scaling is"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu', expected poly_norm or silu"),
        ({"rms_norm_eps": None}, "config.json lacks rms_norm_eps"),
    ],
)
def test_configs_that_the_model_does_not_have_are_refused(tmp_path: Path, keys: dict[str, Any], sentence: str) -> None:
    write_checkpoint(tmp_path / "source")
    rewrite(tmp_path / "source", **keys)
    with pytest.raises(CheckpointError, match=sentence):
        AutoModelForCausalLM.from_pretrained(tmp_path / "source")


@pytest.mark.parametrize("tied", [False, True])
def test_the_groups_that_the_stock_trainer_makes(tmp_path: Path, tied: bool) -> None:
    """It goes by names: every matrix is decayed, and so are lambdas, sub-norms and PolyNorm's weights."""
    write_checkpoint(tmp_path / "source", tied=tied, bias=True, layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    layer, attention, mlp = "model.layers.0.", "model.layers.0.self_attn.", "model.layers.0.mlp."
    projections = [*(f"{attention}{p}_proj" for p in "qkvo"), *(f"{mlp}{p}_proj" for p in ("gate", "up", "down"))]
    assert [name for name in names if name not in decayed] == [
        *(f"{name}.bias" for name in projections), f"{mlp}act_fn.bias",
        f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight",
    ]  # fmt: skip
    assert [name for name in names if name in decayed] == [
        "model.embed_tokens.weight", *(f"{attention}lambda_{v}" for v in ("q1", "k1", "q2", "k2")),
        *(f"{attention}{p}_proj.weight" for p in "qkvo"), f"{attention}subln.weight",
        *(f"{name}.weight" for name in projections[4:]), f"{mlp}act_fn.weight", *([] if tied else ["lm_head.weight"]),
    ]  # fmt: skip


def test_the_order_of_parameters_is_the_reference_models() -> None:
    config = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 20,
        "num_noise_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 50, "rope_theta": 1e4,
        "rms_norm_eps": 1e-6, "hidden_act": "poly_norm", "use_bias": True,
    }  # fmt: skip
    with torch.device("meta"):
        model = MotifForCausalLM(MotifConfig(**config))
        assert layout(model) == layout(GdaModel(model.config.gda))
