"""Deeper and otherwise wider DiffLlamas, judged by `transformers`, and their files by safetensors' own reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import gdagrow.models.hf  # noqa: F401, because it tells transformers of the model
from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.models.gda import load_model
from gdagrow.output import weights_output
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from gdagrow.verify.gradients import compare_gradients
from gdagrow.verify.logits import compare
from gdagrow.verify.tokens import random_tokens
from gdagrow.verify.weights import check_weights
from tests.diffllama import TOPOLOGIES, floor_of, load_diffllama, save_diffllama
from tests.growths import Grown, grow
from tests.reference import reference_logits

IDS = random_tokens(40, seqs=2, length=13, seed=1)
ROUNDING = 1e-11  # as in test_diffllama_growth.py


def logits(directory: Path) -> Tensor:
    """By `transformers` alone."""
    with torch.no_grad():
        found: Tensor = load_diffllama(directory)(IDS).logits
    return found


def apart(got: Tensor, expected: Tensor) -> float:
    assert got.dtype == expected.dtype == torch.float64
    assert float(expected.std()) > 0.01 * float(expected.abs().max()), "logits that say nothing"
    return float((got - expected).abs().max() / expected.abs().max())


def require_proven(grown: Grown) -> float:
    """By everything of gdagrow; returns how much of a disturbance reaches the source's logits."""
    assert check_weights(grown.source, grown.target).equivalent
    gradients = compare_gradients(grown.source, grown.target, IDS)
    assert gradients.equivalent, [tensor for tensor in gradients.tensors if not tensor.agrees]
    found = compare(grown.source, grown.target, IDS)
    assert found.equivalent
    assert (found.first_difference, found.parts_not_compared, found.settings) == (None, None, ())
    return found.condition


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", TOPOLOGIES[:3], ids=str)
def test_new_blocks_at_the_top_change_not_a_bit(
    tmp_path: Path, sizes: tuple[int, int, int, int, int, int, bool], dtype: torch.dtype
) -> None:
    """A DiffLlama stays one. What a new block adds to the stream is zero, so every number after it is the same."""
    save_diffllama(tmp_path / "source", sizes, dtype=dtype, bias=True)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"depth": 2, "insert": "top"})
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("diffllama", sizes[2] + 2)
    assert len(load_diffllama(grown.target).model.layers) == sizes[2] + 2
    assert torch.equal(logits(grown.target), logits(grown.source))
    require_proven(grown)


def test_wider_and_deeper_at_once(tmp_path: Path) -> None:
    """As one growth that `transformers` judges: where nothing but heads and the FFN grows, norms see the same."""
    save_diffllama(tmp_path / "source", TOPOLOGIES[2], dtype=torch.bfloat16)
    recipe = {"depth": 1, "insert": "top", "signal": 2, "noise": 2, "ffn_to": 31, "snr_db": 30.0}
    grown = grow(tmp_path / "source", tmp_path / "grown", recipe)
    assert load_diffllama(grown.target).config.intermediate_size == 31
    assert apart(logits(grown.target), logits(grown.source)) <= ROUNDING
    require_proven(grown)


CONVERTED: list[dict[str, Any]] = [
    {"depth": 2, "insert": "bottom"},
    {"depth": 2, "insert": "even"},
    {"insert": "after:0", "hidden_to": 50},
    {"depth": 1, "insert": "bottom", "signal": "3:1", "select": "norm", "hidden_to": 29, "ffn_to": 70},
    {"depth": 1, "insert": "top", "signal": 4, "noise": 2, "kv": 2, "hidden": 2, "ffn_to": 59},
]


@pytest.mark.parametrize("growth", CONVERTED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_converted_model_with_moved_layers_is_the_source_of_transformers(
    tmp_path: Path, growth: dict[str, Any], dtype: torch.dtype
) -> None:
    """By the reference model and by loops over heads, which know only Motif's layout, against `transformers`."""
    save_diffllama(tmp_path / "source", TOPOLOGIES[2], dtype=dtype, bias=True)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"to": "motif", **growth})
    floor = floor_of(load_diffllama(grown.source), require_proven(grown))
    config, expected = json.loads((grown.target / "config.json").read_text()), logits(grown.source)
    with torch.no_grad():
        ours = load_model(grown.target, dtype=torch.float64)(IDS).logits
        loops = reference_logits(grown.after, config, IDS)
    assert apart(ours, expected) <= floor
    assert apart(loops, expected) <= floor
    assert apart(ours, loops) <= ROUNDING


def test_float64_beside_bfloat16_by_the_reader_of_safetensors(tmp_path: Path) -> None:
    """Shards with tensors of two dtypes, each where its own size lets it begin, and an index that adds them up."""
    save_diffllama(tmp_path / "source", TOPOLOGIES[2], dtype=torch.bfloat16)
    recipe = make_recipe({"to": "motif", "depth": 1, "insert": "bottom", "hidden_to": 33})
    plan = make_plan(read_header(tmp_path / "source"), recipe)
    expand(plan, tmp_path / "grown", weights_output(plan, 9_000))
    index = json.loads((tmp_path / "grown" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    dtypes, total = {}, 0
    for file in files:
        tensors = load_file(tmp_path / "grown" / file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        with safe_open(tmp_path / "grown" / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, for it is no mapping
                assert index["weight_map"][name] == file
                assert (
                    opened.get_slice(name).get_dtype()
                    == {"torch.float64": "F64", "torch.bfloat16": "BF16"}[str(tensors[name].dtype)]
                )
                dtypes[name] = tensors[name].dtype
    assert total == index["metadata"]["total_size"] == plan.num_bytes
    made = [name for name, dtype in dtypes.items() if dtype == torch.float64]
    assert {name.split("layers.")[-1].split(".", 1)[-1] for name in made} == {
        "norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.subln.weight",
        *(f"self_attn.lambda_{vector}" for vector in ("q1", "k1", "q2", "k2")),
    }  # fmt: skip
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float64)
        assert apart(model(IDS).logits, load_model(tmp_path / "grown", dtype=torch.float64)(IDS).logits) <= ROUNDING
