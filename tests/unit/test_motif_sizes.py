"""The published models, as headers without weights: Motif-2.6B grows to Motif-2-12.7B."""

from pathlib import Path
from typing import Any

import pytest

from gdagrow.archs.motif import Motif
from gdagrow.hints import hints_of
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import make_recipe, read_recipe
from tests.growths import header

RECIPES = Path(__file__).parents[2] / "recipes"

# As published: no num_noise_heads and no head_dim, which are half of the heads and hidden / heads.
MOTIF_2_6B: dict[str, Any] = {
    "model_type": "Motif", "hidden_size": 2048, "num_hidden_layers": 32, "intermediate_size": 8192,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 219520, "tie_word_embeddings": True,
    "rope_theta": 500000.0, "max_position_embeddings": 16384, "hidden_act": "poly_norm", "rms_norm_eps": 1e-6,
    "auto_map": {"AutoModelForCausalLM": "modeling_motif.MotifForCausalLM"}, "torch_dtype": "bfloat16",
}  # fmt: skip


def parameters(plan: GrowthPlan, prefix: str = "") -> int:
    return sum(tensor.num_elements for tensor in plan.tensors if tensor.name.startswith(prefix))


def test_motif_2_6b_grows_to_motif_2_12_7b() -> None:
    source = header(MOTIF_2_6B)
    # Motif-2.6B has 2.597 B parameters: each layer four projections of 2048 * 2048, three of 8192 * 2048, four lambdas
    # of 128, a sub-norm of 256, PolyNorm's 3 + 1 and two norms.
    layer = 4 * 2048 * 2048 + 3 * 8192 * 2048 + 4 * 128 + 256 + 4 + 2 * 2048
    assert sum(t.num_elements for t in source.tensors.values()) == 32 * layer + 219520 * 2048 + 2048 == 2_597_218_432

    values = read_recipe(RECIPES / "motif-2.6b-to-12.7b.yaml")
    plan = make_plan(source, make_recipe(values))
    changed = {key: value for key, value in plan.config.items() if MOTIF_2_6B.get(key) != value}
    # Motif-2-12.7B: 40 layers, 40 query heads, 8 of them noise, 16 kv heads, 4096, 16384, not tied.
    assert changed == {
        "hidden_size": 4096, "num_hidden_layers": 40, "intermediate_size": 16384, "num_attention_heads": 40,
        "num_noise_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    assert plan.config["num_key_value_heads"] == 16
    assert list(MOTIF_2_6B) == list(plan.config)[: len(MOTIF_2_6B)]

    # Motif-2-12.7B's layer by the published layout: q [40*128, 4096], k and v [16*128, 4096], o [4096, 2*32*128], ...
    layer = (40 * 128 + 2 * 16 * 128 + 2 * 32 * 128) * 4096 + 3 * 16384 * 4096 + 4 * 128 + 256 + 4 + 2 * 4096
    assert parameters(plan, "model.layers.0.") == parameters(plan, "model.layers.39.") == layer == 272_638_724
    # The published 12.704 B.
    assert parameters(plan) == 40 * layer + 2 * 219520 * 4096 + 4096 == 12_703_860_896
    stored = 2 * parameters(plan) + 2 * 40 * 4 * 128
    # bf16, lambdas in float32; sub-norm and half of the lambdas in float64 in layers that have another index.
    assert stored < plan.num_bytes <= stored + 36 * (6 * 256 + 4 * 2 * 128)


def test_uniform_growth_of_a_plain_source_stays_plain() -> None:
    plan = make_plan(header(MOTIF_2_6B), make_recipe({"uniform": 2}))
    changed = {key: value for key, value in plan.config.items() if MOTIF_2_6B.get(key) != value}
    assert changed == {
        "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    assert plan.after.heads.ratio == 1
    # Every matrix of a layer grows fourfold.
    layer = 4 * (4 * 2048 * 2048 + 3 * 8192 * 2048) + 4 * 128 + 256 + 4 + 2 * 4096
    assert parameters(plan) == 32 * layer + 219520 * 4096 + 4096
    assert plan.tied_after
    assert hints_of(plan) == ()


@pytest.mark.parametrize(
    ("recipe", "explicit"),
    [
        ({"signal": 2}, {"num_noise_heads": 8, "head_dim": 128, "num_attention_heads": 24}),
        ({"hidden": 2}, {"head_dim": 128, "hidden_size": 4096}),
        ({"ffn": 2}, {"intermediate_size": 16384}),
        ({"signal": 2, "noise": 2, "kv": 2}, {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 32}),
    ],
    ids=str,
)
def test_plain_configs_say_what_their_defaults_no_longer_do(recipe: dict[str, Any], explicit: dict[str, int]) -> None:
    plan = make_plan(header(MOTIF_2_6B), make_recipe(recipe))
    assert {key: value for key, value in plan.config.items() if MOTIF_2_6B.get(key) != value} == explicit
    assert Motif().sizes(plan.config) == plan.after
