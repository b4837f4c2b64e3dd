"""The growth that leads from one config to another: what is derived, and every obstacle in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.errors import CheckpointError, GdagrowError, PlanError, RecipeError
from gdagrow.plan import make_plan
from gdagrow.recipe import Recipe, make_recipe
from gdagrow.targets import TARGETS, read_target
from gdagrow.targets.like import recipe_like
from tests.growths import RANDOM, growths, header, topologies

# 4 groups of 2:1 on 2 KV groups.
SMALL: dict[str, Any] = {
    "model_type": "motif", "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48,
    "num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 61,
    "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 128,
}  # fmt: skip
DIFFLLAMA: dict[str, Any] = {
    "model_type": "diffllama", "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 61, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def derived(
    changes: dict[str, Any], recipe: dict[str, Any] | None = None, source: dict[str, Any] = SMALL
) -> dict[str, Any]:
    """The recipe's own words for the way to the source's config with some keys changed."""
    return recipe_like(source, source | changes, make_recipe({"like": "there"} | (recipe or {}))).as_dict()


def obstacles(
    changes: dict[str, Any], recipe: dict[str, Any] | None = None, source: dict[str, Any] = SMALL
) -> list[str]:
    with pytest.raises(PlanError) as error:
        derived(changes, recipe, source)
    told = str(error.value)
    start = "like there cannot be reached: "
    assert told.startswith(start), told
    # A sentence may have its own semicolons; each begins with the key that it is about.
    return told.removeprefix(start).split("; ")


@pytest.mark.parametrize(
    ("changes", "recipe", "expected"),
    [
        ({"num_attention_heads": 20}, {}, {"signal": 2}),
        ({"num_attention_heads": 16}, {}, {"signal": "3:1"}),
        ({"num_attention_heads": 16}, {"select": "norm"}, {"signal": "3:1", "select": "norm"}),
        # Four heads a group from two: as a ratio where heads are to be chosen.
        ({"num_attention_heads": 20}, {"select": "given:F"}, {"signal": "4:1", "select": "given:F"}),
        ({"num_attention_heads": 24, "num_noise_heads": 8}, {}, {"signal": 2, "noise": 2}),
        ({"num_attention_heads": 32, "num_noise_heads": 8}, {}, {"signal": 3, "noise": 2}),
        # The two signal heads of a group go to two copies of its noise head.
        ({"num_attention_heads": 16, "num_noise_heads": 8}, {}, {"noise": 2}),
        ({"num_key_value_heads": 8}, {}, {"kv": 2}),
        ({"hidden_size": 64, "intermediate_size": 144}, {}, {"hidden": 2, "ffn": 3}),
        ({"hidden_size": 40, "intermediate_size": 49}, {}, {"hidden_to": 40, "ffn_to": 49}),
        ({"hidden_size": 80, "rms_norm_eps": 1e-6 * 2 * 32 / 80}, {}, {"hidden_to": 80}),
        ({"num_hidden_layers": 6}, {"insert": "top"}, {"layers": 6, "insert": "top"}),
        ({"num_hidden_layers": 6}, {"insert": "after:0,3"}, {"layers": 6, "insert": "after:0,3"}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"intermediate_size": 96}, {"rope_theta": 1e4}, {"ffn": 2}),
        ({"max_position_embeddings": 4096}, {}, {"max_position_embeddings": 4096}),
        (
            {"hidden_size": 64},
            {"seed": 7, "snr_db": 60, "exact_copies": True},
            {"hidden": 2, "seed": 7, "snr_db": 60.0, "exact_copies": True},
        ),
    ],
    ids=str,
)
def test_what_is_derived(changes: dict[str, Any], recipe: dict[str, Any], expected: dict[str, Any]) -> None:
    assert derived(changes, recipe) == dict(sorted(expected.items()))


def test_tied_embeddings_are_untied_where_the_target_has_a_head_of_its_own() -> None:
    tied = SMALL | {"tie_word_embeddings": True}
    assert derived({"tie_word_embeddings": False}, source=tied) == {"embeddings": "untie"}
    assert derived({"intermediate_size": 96}, {"embeddings": "keep"}, tied) == {"ffn": 2}


def test_the_published_models_lead_to_one_another() -> None:
    source, target = TARGETS["motif-2.6b"] | {"rms_norm_eps": 1e-6}, read_target("Motif-2-12.7B")
    recipe = recipe_like(source, target, make_recipe({"like": "motif-2-12.7b", "rope_theta": "1000000"}))
    assert recipe == Recipe(
        signal=4, hidden=2, ffn=2, layers=40, embeddings="untie", rope_theta=1e6, max_position_embeddings=32768
    )
    with pytest.raises(PlanError) as error:
        recipe_like(source, target, make_recipe({"like": "motif-2-12.7b"}))
    assert str(error.value) == (
        "like motif-2-12.7b cannot be reached: rope_theta: the target has 1000000 and the source 500000; only 500000 "
        "keeps the function; add --rope-theta 1000000 (rope_theta: 1000000 in a recipe) to change it"
    )


def test_diffllama_is_converted_to_motif() -> None:
    target = SMALL | {"num_attention_heads": 16, "attn_rms_norm_eps": 1e-5, "rms_norm_eps": 1e-5}
    recipe = recipe_like(DIFFLLAMA, target, make_recipe({"like": "there"}))
    assert recipe == Recipe(to="motif", signal=3, max_position_embeddings=128)
    assert derived({"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64}, source=DIFFLLAMA) == {
        "hidden": 2, "kv": 2, "noise": 2, "signal": 2,
    }  # fmt: skip
    assert obstacles({"hidden_size": 40}, source=DIFFLLAMA) == [
        "hidden_size: the target has 40, which is no multiple of the source's 32, and the diffllama layout has one "
        "rms_norm_eps for hidden and head norms",
        "the nearest reachable are 32 and 64",
    ]


def test_every_obstacle_is_named_at_once() -> None:
    changes = {
        "head_dim": 16, "vocab_size": 62, "hidden_act": "poly_norm", "use_bias": True, "rms_norm_eps": 1e-5,
        "attn_rms_norm_eps": 1e-6, "rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn"}, "num_noise_heads": 6,
        "num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 31, "intermediate_size": 47,
        "num_hidden_layers": 3, "tie_word_embeddings": True, "use_sliding_window": True,
    }  # fmt: skip
    told = "; ".join(obstacles(changes, {"insert": "top"}))
    for sentence in (
        "head_dim: the target has 16 and the source 8; the softmax scale and RoPE depend on it, so only 8 is reachable",
        "vocab_size: the target has 62 and the source 61; the vocabulary does not grow, so only 61 is reachable",
        "hidden_act: the target has poly_norm and the source silu; another activation is another function",
        "biases: the target has true and the source false; none is added or dropped, so only false is reachable",
        "rope_scaling: the target has {'rope_type': 'yarn'} and the source none; another RoPE is another function",
        "use_sliding_window: the target has true and the source false; a window is another function",
        "noise heads: the target has 6, which is no multiple of the source's 4; the nearest reachable: 4 and 8",
        "KV groups: the target has 3, which is no multiple of the source's 2; the nearest reachable: 2 and 4",
        "hidden_size: the target has 31 and the source 32; 32 or more is reachable",
        "intermediate_size: the target has 47 and the source 48; 48 or more is reachable",
        "attn_rms_norm_eps: the target has 1e-06 and the source 1e-05; another one is another function",
        "rms_norm_eps: the target has 1e-05 and the source 1e-06; another one is another function",
        "num_hidden_layers: the target has 3 and the source 4; 4 or more is reachable",
        "tie_word_embeddings: the target has true and the source false; two matrices do not become one",
        "rope_theta: the target has 500000 and the source 10000; only 10000 keeps the function; add --rope-theta",
    ):
        assert sentence in told


@pytest.mark.parametrize(
    ("changes", "recipe", "sentence"),
    [
        (
            {"num_attention_heads": 24, "num_noise_heads": 12},
            {},
            "ratio: the target has 1:1 and the source 2:1; with 3 times the noise heads 2:1 and above are reachable, "
            "for no signal head is dropped",
        ),
        (
            {"num_attention_heads": 16 * 501, "num_noise_heads": 16},
            {"select": "norm"},
            "signal 500:1 with noise x4: a signal head would have 1000 copies, expected at most 512",
        ),
        (
            {"num_attention_heads": 4 * 2 * 513 + 4},
            {},
            "signal heads: the target has 4104, 513 times the source's 8; at most 512 times, 4096, is reachable",
        ),
        ({"hidden_size": 32 * 600}, {}, "hidden_size: the target has 19200, 600 times the source's 32"),
        (
            {"num_hidden_layers": 6},
            {"insert": "after:1"},
            "insert after:1: it places 1 new blocks and 2 are asked for",
        ),
        ({"hidden_size": 64}, {"insert": "top"}, "insert top: the target has 4 layers like the source; leave it out"),
        (
            {"hidden_size": 64},
            {"select": "norm"},
            "select norm: from 2:1 to 2:1 every signal head is cloned equally often; leave it out",
        ),
        ({"hidden_size": 64}, {"embeddings": "untie"}, "embeddings untie: the target's are not tied; leave it out"),
        ({"hidden_size": 64}, {"rope_theta": 5e5}, "rope_theta 500000: the target has 10000; give that one, or leave"),
        ({"max_position_embeddings": "many"}, {}, "max_position_embeddings: expected a whole number of 1 or more"),
        (
            {"hidden_size": 64},
            {"max_position_embeddings": 64},
            "max_position_embeddings 64: the target has 128; leave it out",
        ),
        ({"model_type": "diffllama"}, {}, "model_type: the target has the diffllama layout and the source would have"),
        ({"hidden_size": 40, "rms_norm_eps": 2e-6}, {}, "rms_norm_eps: the target has 2e-06 and the source 1e-06"),
    ],
    ids=str,
)
def test_an_obstacle(changes: dict[str, Any], recipe: dict[str, Any], sentence: str) -> None:
    target = SMALL | {"num_attention_heads": 8} if changes.get("model_type") == "diffllama" else {}
    assert "; ".join(obstacles(target | changes, recipe)).startswith(sentence)


def test_poly_norm_grows_by_whole_factors() -> None:
    assert obstacles({"intermediate_size": 100}, source=SMALL | {"hidden_act": "poly_norm"}) == [
        "intermediate_size: the target has 100, which is no multiple of the source's 48, and PolyNorm takes the mean "
        "over the FFN with an eps that is not stored",
        "the nearest reachable are 96 and 144",
    ]


def test_a_ratio_that_no_recipe_can_say() -> None:
    with pytest.raises(RecipeError, match="like there: signal: expected a target ratio of at most 512:1, got '513:1'"):
        derived({"num_attention_heads": 4 * 514})


def test_the_same_sizes_are_no_growth() -> None:
    with pytest.raises(PlanError, match=r"^like there: nothing would grow: the source has these sizes already$"):
        derived({})


@settings(RANDOM, max_examples=200)
@given(st.data())
def test_what_any_growth_of_widths_makes_is_derived_again(data: st.DataObject) -> None:
    """The config that a recipe grows is reached by a recipe with the same sizes: the same config, key for key."""
    topology = data.draw(topologies())
    config = config_of(topology)
    grown = make_plan(header(config), make_recipe(data.draw(growths(topology)))).config
    if grown == config:
        return  # it drew a ratio that the source has
    recipe = recipe_like(config, grown, make_recipe({"like": "there"}))
    assert make_plan(header(config), recipe).config == grown


def config_of(topology: dict[str, Any]) -> dict[str, Any]:
    """The config of `topologies` without biases, which an in-memory header does not have."""
    groups, ratio = topology["groups"], topology["ratio"]
    return SMALL | {
        "hidden_size": topology["hidden"], "intermediate_size": topology["ffn"], "vocab_size": topology["vocab"],
        "num_hidden_layers": topology["layers"], "num_attention_heads": groups * (ratio + 1),
        "num_noise_heads": groups, "num_key_value_heads": 2 * topology["kv_groups"], "head_dim": topology["head_dim"],
        "hidden_act": topology["activation"], "tie_word_embeddings": topology["tied"],
    }  # fmt: skip


def test_a_target_is_a_directory_a_file_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    for text in (tmp_path / "model", tmp_path / "model" / "config.json"):
        assert read_target(str(text)) == SMALL
    assert read_target("motif-2.6b")["hidden_size"] == 2048
    # What exists goes before a name.
    (tmp_path / "motif-2.6b").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert read_target("motif-2.6b") == SMALL


@pytest.mark.parametrize(
    ("text", "content", "error", "sentence"),
    [
        (
            "nowhere",
            None,
            RecipeError,
            "like nowhere: nowhere cannot be read (No such file or directory); give a directory with a config.json, "
            "such a file, or one of motif-2.6b, motif-2-12.7b",
        ),
        ("no\0where", None, RecipeError, "like no\0where: no\0where cannot be read (embedded null byte)"),
        ("c.json", b"[]", CheckpointError, "like c.json: c.json: expected a JSON object, got list; restore the file"),
        ("c.json", b"{", CheckpointError, "like c.json: c.json: not valid JSON"),
        ("c.json", b" " * 10_000_001, RecipeError, "like c.json: c.json is larger than 10000000 bytes"),
    ],
)
def test_what_is_no_target(
    text: str, content: bytes | None, error: type[GdagrowError], sentence: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(text).write_bytes(content)
    with pytest.raises(error) as caught:
        read_target(text)
    assert str(caught.value).startswith(sentence)


def test_a_target_that_is_no_model_is_told_apart_from_the_source() -> None:
    with pytest.raises(CheckpointError, match=r"^like there: config\.json: model_type 'llama' has no table"):
        derived({"model_type": "llama"})
