"""Plans from headers made in memory: grown configs, multipliers, lost moments, hints, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest

from gdagrow.choices import Moments
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.growth import Fill
from gdagrow.header import Header
from gdagrow.hints import hints_of
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import make_recipe
from gdagrow.states.moments import plan_moments
from gdagrow.views.deeper import MOVED, NEW_BLOCK
from tests.growths import header, info

ATTENTION = "model.layers.{layer}.self_attn."

SMALL: dict[str, Any] = {
    "model_type": "motif", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61,
    "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "x_note": [1, None],
}  # fmt: skip


def planned(recipe: dict[str, Any], **changes: Any) -> GrowthPlan:
    return make_plan(header(SMALL | changes), make_recipe(recipe))


@pytest.mark.parametrize("model_type", ["Motif", "motif", "MOTIF"])
def test_only_grown_keys_change(model_type: str) -> None:
    plan = planned({"signal": "4:1", "ffn": 2}, model_type=model_type)
    assert plan.config == SMALL | {
        "model_type": model_type, "intermediate_size": 96, "num_attention_heads": 10, "num_noise_heads": 2,
    }  # fmt: skip
    assert list(plan.config) == list(SMALL)
    assert plan.factors == {"signal": "4:1", "noise": 1, "kv": 1, "hidden": 1, "ffn": 2}


NEWER = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("found", "keys"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 2e4}),
        ({"rope_parameters": NEWER}, {"rope_parameters": {**NEWER, "rope_theta": 2e4}}),
        ({"rope_theta": 1e4, "rope_parameters": NEWER},
         {"rope_theta": 2e4, "rope_parameters": {**NEWER, "rope_theta": 2e4}}),
        ({"rope_theta": 1e4, "rope_parameters": None}, {"rope_theta": 2e4, "rope_parameters": None}),
    ],
    ids=["as transformers 4 writes it", "as 5 does", "as both", "as 4, with a null"],
)  # fmt: skip
def test_the_base_of_rope_changes_wherever_it_stands(found: dict[str, Any], keys: dict[str, Any]) -> None:
    config = {key: value for key, value in SMALL.items() if key != "rope_theta"} | found
    plan = make_plan(header(config), make_recipe({"rope_theta": 2e4}))
    assert plan.config == config | keys
    assert plan.changed_keys == {"rope_theta": (1e4, 2e4)}
    assert "rope_theta 10000.0 to 20000.0 changes the function" in " ".join(hints_of(plan))
    with pytest.raises(PlanError, match="nothing would grow"):
        make_plan(header(plan.config), make_recipe({"rope_theta": 2e4}))


def test_learning_rate_multipliers() -> None:
    plan = planned({"signal": 3, "hidden": 2, "ffn": 5}, tie_word_embeddings=True)
    suggested = {t.name.removeprefix("model.layers.1."): t.learning_rate_multiplier for t in plan.tensors}
    assert {name: rate for name, rate in suggested.items() if not name.startswith("model.layers.0.") and rate != 1} == {
        "self_attn.q_proj.weight": 1 / 2, "self_attn.k_proj.weight": 1 / 2, "self_attn.v_proj.weight": 1 / 2,
        "self_attn.o_proj.weight": 1 / 3, "mlp.gate_proj.weight": 1 / 2, "mlp.up_proj.weight": 1 / 2,
        "mlp.down_proj.weight": 1 / 5, "model.norm.weight": 1 / 2,
    }  # fmt: skip
    # What is fresh is no copy: 70 features are two copies of each of 32, and 6 that are new.
    between = planned({"hidden_to": 70})
    assert {t.learning_rate_multiplier for t in between.tensors if "q_proj" in t.name} == {1 / 2}
    # A third of the heads cloned once: on average a column is 3/4 of what it was.
    uneven = planned({"signal": "4:1"})
    assert {t.learning_rate_multiplier for t in uneven.tensors if "o_proj" in t.name} == {3 / 4}


GROUP, KV = ("copies along group serve unequal shares of what they served",
             "copies along kv serve unequal shares of what they served")  # fmt: skip
UNTIED = {
    "model.embed_tokens.weight": "its tied gradient was that of two parameters",
    "lm_head.weight": "it is new: the source's head was tied to the embedding",
}


@pytest.mark.parametrize(
    ("recipe", "lost"),
    [
        ({"signal": "5:1", "hidden": 3}, {}),
        ({"uniform": 2}, {}),
        ({"signal": "4:1", "noise": 3}, {}),
        ({"signal": 2, "noise": 3}, {"q_proj": GROUP}),
        ({"noise": 3}, {"q_proj": GROUP}),
        ({"kv": 2}, {"k_proj": KV, "v_proj": KV}),
        ({"noise": 3, "kv": 3}, {"q_proj": GROUP, "k_proj": KV, "v_proj": KV}),
        ({"embeddings": "untie"}, UNTIED),
        ({"kv": 2, "embeddings": "untie"}, {"k_proj": KV, "v_proj": KV, **UNTIED}),
    ],
    ids=str,
)
def test_moments_lost(recipe: dict[str, Any], lost: dict[str, str]) -> None:
    named = {f"{ATTENTION}{n}.weight" if n.endswith("_proj") else n: text for n, text in lost.items()}
    plan = planned(recipe, tie_word_embeddings="untie" in recipe.values())
    assert {t.parameter: t.moments_lost for t in plan.tensors if t.moments_lost} == named
    reasons: dict[str, set[str]] = {}
    for name, text in named.items():
        reasons.setdefault(text, set()).add(name.removeprefix("model.layers.{layer}."))
    hints = [
        hint.removeprefix("optimizer moments cannot be carried exactly for ").split("; ") for hint in hints_of(plan)
    ]
    told = {text: set(names.split(", ")) for hint in hints for names, text in (part.split(": ", 1) for part in hint)}
    assert told == reasons


def test_moments_that_are_carried_all_the_same_are_never_those_of_a_neighbour() -> None:
    """`carry` is for those that the mirror rule misses; a new block and a lambda that moved have none of their own."""
    plan = planned({"kv": 2, "insert": "after:0"})
    auto, carry = (plan_moments(plan, policy) for policy in (Moments.auto, Moments.carry))
    for name, found in carry.items():
        if ".layers.1." in name:
            assert found.reset == auto[name].reset == NEW_BLOCK, name
        elif ".layers.2." in name and name.endswith(("lambda_q2", "lambda_k2")):
            assert found.reset == auto[name].reset == MOVED, name
        else:
            assert found.reset is None, name
    assert {name for name, found in auto.items() if found.reset != carry[name].reset} == {
        f"model.layers.{layer}.self_attn.{row}_proj.weight" for layer in (0, 2) for row in "kv"
    }


def test_noise_is_for_split_weights_only() -> None:
    exact = planned({"hidden": 2, "exact_copies": True})
    assert hints_of(exact) == ("exact copies see identical gradients and stay identical for ever in training",)
    assert not any(tensor.noisy for tensor in exact.tensors)
    plan = planned({"ffn": 2, "signal": "4:1", "hidden": 1}, tie_word_embeddings=True)
    assert {t.name.split(".", 3)[-1] for t in plan.tensors if t.noisy} == {
        "self_attn.o_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    # The norm of a tied head carries the split without noise.
    assert not {t.name for t in planned({"hidden": 2}, tie_word_embeddings=True).tensors if t.noisy} & {
        "model.norm.weight", "model.embed_tokens.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "way_back"),
    [
        ({"signal": 2}, "; noise x2 as well would make it 3:1"),
        ({"signal": 3}, "; noise x3 as well would make it 3:1"),
        ({"signal": 4, "noise": 2}, "; noise x4 as well would make it 3:1"),
        ({"signal": 5}, "; noise x3 as well would make it 5:1"),
        ({"signal": "6:1"}, "; the factors signal x2, noise x2 would make it 3:1"),
        ({"signal": "6:1", "noise": 2}, "; the factors signal x4, noise x4 would make it 3:1"),
        ({"signal": "7:1"}, ""),
    ],
    ids=str,
)
def test_hint_of_a_ratio_beyond_the_paper(recipe: dict[str, Any], way_back: str) -> None:
    plan = planned(recipe)
    ratio = plan.after.heads.ratio
    expected = (
        f"the ratio {ratio}:1 is above 5:1, where the paper saw quality decline (3:1 to 4:1 train best){way_back}"
    )
    assert hints_of(plan) == (expected,)
    if way_back:
        # What the hint proposes is a growth, and does what the hint says.
        factors = {word.split(" ")[0]: int(word.split(" x")[1].split(" ")[0])
                   for word in way_back.removeprefix("; ").removeprefix("the factors ").split(", ")}  # fmt: skip
        back = planned(recipe | factors).after.heads
        assert f"{back.ratio}:1" in way_back
        assert back.num_signal_heads == plan.after.heads.num_signal_heads


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"signal": "3:1"}, "nothing would grow: the source already has the ratio 3:1"),
        (
            {"ffn": 2, "embeddings": "untie"},
            "embeddings untie: the source's head and embedding are not tied; leave it out",
        ),
        (
            {"ffn": 2, "embeddings": "keep"},
            "embeddings keep: the source's head and embedding are not tied; leave it out",
        ),
        ({"ffn_to": 40}, "ffn to 40: the source has 48, and growth never drops a feature; choose 48 or more"),
        ({"hidden_to": 31}, "hidden to 31: the source has 32, and growth never drops a feature; choose 32 or more"),
        ({"ffn_to": 48 * 513}, "ffn to 24624: more than 512 copies of 48; choose a smaller size"),
        ({"depth": 513}, "513 new blocks: expected at most 512 in one growth; ask for fewer"),
    ],
)
def test_refusals(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        planned(recipe)
    assert str(error.value) == message


@pytest.mark.parametrize("ffn", [49, 100, 143])
def test_polynorm_has_no_units_beside_whole_copies(ffn: int) -> None:
    with pytest.raises(PlanError) as error:
        planned({"ffn_to": ffn}, hidden_act="poly_norm")
    near = "48 or 96" if ffn == 49 else "96 or 144"
    assert str(error.value) == (
        f"ffn 48 to {ffn}: PolyNorm averages over all FFN units, with an eps that no config holds, so that units "
        f"beside whole copies would change all others; choose {near}"
    )
    assert planned({"ffn_to": 144}, hidden_act="poly_norm").after.ffn == 144


def test_what_is_fresh_and_what_is_made_is_told() -> None:
    plan = planned({"insert": "after:0", "hidden_to": 70, "ffn_to": 100, "seed": 3}, initializer_range=0.05)
    repaired = "it makes up for the change of its layer's lambda_init"
    assert hints_of(plan) == (
        "hidden: 6 features are new and zero; the weights that read them are drawn uniformly with deviation 0.05 and "
        "seed 3; rms_norm_eps 1e-06 to 9.14286e-07",
        "ffn: 4 units are new, drawn uniformly with deviation 0.05 and seed 3, and read with weights of zero",
        "stored in float64, because a shorter dtype would round them: input_layernorm.weight, "
        "post_attention_layernorm.weight, model.norm.weight (it makes up for the features that the norm averages over "
        f"besides); self_attn.lambda_q2, self_attn.lambda_k2, self_attn.subln.weight ({repaired}); a trainer that "
        "casts them changes the function by that rounding",
        f"optimizer moments cannot be carried exactly for self_attn.lambda_q2, self_attn.lambda_k2: {repaired}",
    )
    # Past a gain of zero no gradient would reach what writes a fresh feature.
    gains = [tensor.growth.fills for tensor in plan.tensors if tensor.part == "norm"]
    assert gains == [(Fill.mean,)] * 7


def test_every_tensor_that_does_not_fit_is_named_in_one_error() -> None:
    q, k, gate, bias = (f"model.layers.{end}" for end in (
        "0.self_attn.q_proj.weight", "1.self_attn.k_proj.weight", "1.mlp.gate_proj.weight", "0.mlp.up_proj.bias",
    ))  # fmt: skip
    broken = header(SMALL, {
        "model.norm.weight": None, q: info(q, (64, 31)), k: info(k, (16, 32), "I32"), bias: info(bias, (48,)),
        gate: info(gate, (48, 31), "F8_E4M3"), "extra.weight": info("extra.weight", (1,)),
    })  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        make_plan(broken, make_recipe({"signal": 2}))
    problems = [
        "missing model.layers.1.mlp.up_proj.bias",
        "missing model.norm.weight",
        "unknown extra.weight",
        f"{q} has shape [64, 31], expected [64, 32] ((group (signal + 1) head_dim) <- hidden)",
        f"{k} is stored as I32, expected one of F64, F32, BF16, F16",
        f"{gate} has shape [48, 31], expected [48, 32] (ffn <- hidden)",
        f"{gate} is stored as F8_E4M3, expected one of F64, F32, BF16, F16",
    ]
    beginning = "source: 7 tensors do not fit the motif table at the sizes in config.json: "
    assert str(error.value) == beginning + "; ".join(problems)


@pytest.mark.parametrize("model_type", ["llama", None, 3])
def test_a_model_type_without_a_table(model_type: object) -> None:
    with pytest.raises(CheckpointError) as error:
        make_plan(Header(Path("source"), SMALL | {"model_type": model_type}, {}, {}), make_recipe({"signal": 2}))
    known = "gdagrow knows motif, diffllama (docs/add-an-architecture.md says what a new one takes)"
    assert str(error.value) == f"config.json: model_type {model_type!r} has no table; {known}"
