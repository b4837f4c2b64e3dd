"""A DiffLlama checkpoint in Motif's layout: the order of rows, the tensors that are made, the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gdagrow.archs.diffllama import DiffLlama
from gdagrow.archs.motif import Motif
from gdagrow.axes import IndexMap, parse
from gdagrow.coordinates import reordering
from gdagrow.errors import CheckpointError
from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.header import Header
from gdagrow.heads import grow_heads
from gdagrow.models.config import GdaConfig
from gdagrow.output import weights_output
from gdagrow.plan import make_plan
from gdagrow.reading import ViewReader, open_reader
from gdagrow.recipe import make_recipe
from gdagrow.rows import claim
from gdagrow.verify.places import head_at
from gdagrow.verify.weights import check_weights
from gdagrow.views import origin_of
from gdagrow.views.convert import as_motif
from tests.checkpoints import write_checkpoint
from tests.diffllama import as_motif as by_hand
from tests.diffllama import interleave_halves, load_diffllama, save_diffllama
from tests.growths import RANDOM

SIZES = (20, 24, 3, 12, 4, 6, False)
ROWS = {row.name.rpartition("self_attn.")[2]: row.parsed.dims for row in DiffLlama().table({"attention_bias": True})}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("diffllama")
    save_diffllama(directory, SIZES, dtype=torch.bfloat16, bias=True)
    return directory


def test_every_tensor_of_the_view_is_the_one_made_by_hand(stored: Path) -> None:
    """Whole, and in pieces of rows that no run of the map ends at."""
    header = read_header(stored)
    view = as_motif(header)
    assert claim(view, Motif(), Motif().sizes(view.config)).keys() == view.tensors.keys()
    hand = by_hand(load_diffllama(stored))
    with open_reader(view) as reader:
        assert isinstance(reader, ViewReader)
        for name, info in view.tensors.items():
            found = reader.tensor(name)
            assert found.shape == info.shape, name
            assert found.dtype == (torch.float64 if info.dtype == "F64" else torch.bfloat16), name
            whole = hand[name]
            if ".bias" in name and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                whole = interleave_halves(whole[:, None], 6)[:, 0]
            if "lambda_" not in name:
                assert torch.equal(found.double(), whole) or ".subln." in name, name
            pieces = [reader.rows(name, at, min(at + 5, len(whole))) for at in range(0, len(whole), 5)]
            assert torch.equal(torch.cat(pieces), found), name
        made = {name for name, info in view.tensors.items() if info.dtype == "F64"}
        assert {name.split("self_attn.")[1] for name in made} == {"subln.weight", "lambda_q1", "lambda_k1"}
        for layer in range(3):
            q1, k1, subln = (
                f"model.layers.{layer}.self_attn.{name}" for name in ("lambda_q1", "lambda_k1", "subln.weight")
            )
            # The same lambda and the same sub-norm: which vector moved is the only choice there is.
            assert torch.allclose(reader.tensor(q1) @ reader.tensor(k1), hand[q1] @ hand[k1], rtol=1e-14, atol=1e-15)
            assert torch.allclose(reader.tensor(subln), hand[subln], rtol=1e-15, atol=0)
    assert view.shards == header.shards


def test_only_rows_of_queries_keys_and_values_move(stored: Path) -> None:
    view = as_motif(read_header(stored))
    maps = {name: rows for name in view.tensors if (rows := origin_of(view, name).rows)}
    assert {name.split("self_attn.")[1] for name in maps} == {
        f"{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")
    }
    # 6 pairs of query heads, 2 KV groups, head_dim 6: heads 0, 6, 1, 7, ... and 0, 2, 1, 3.
    prefix = "model.layers.2.self_attn."
    assert maps[prefix + "q_proj.weight"].runs[:4] == ((0, 6), (36, 42), (6, 12), (42, 48))
    assert maps[prefix + "k_proj.bias"].runs == ((0, 6), (12, 18), (6, 12), (18, 24))


@settings(RANDOM, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_a_reordering_is_the_transpose_of_halves(groups: int, kv: int, head_dim: int) -> None:
    sizes = {"group": groups, "signal": 1, "kv": kv, "head_dim": head_dim}
    for ours, theirs, pairs in (
        ("(((group signal) + group) head_dim)", "(group (signal + 1) head_dim)", groups),
        ("(2 kv head_dim)", "(kv 2 head_dim)", kv),
    ):
        (old,), (new,) = parse(ours).dims, parse(theirs).dims
        expected = torch.arange(2 * pairs * head_dim).view(2, pairs, head_dim).transpose(0, 1).flatten().tolist()
        assert list(reordering(old, new, sizes)) == expected
        assert reordering(new, new, sizes) == IndexMap.identity(2 * pairs * head_dim)


def test_dimensions_of_other_coordinates_are_no_reorderings() -> None:
    sizes = {"group": 2, "signal": 3, "kv": 2, "head_dim": 2}
    for one, other in (("(group head_dim)", "(kv head_dim)"), ("(2 kv)", "(kv 2 head_dim)"), ("(group 2)", "group")):
        with pytest.raises((KeyError, AssertionError)):
            reordering(parse(one).dims[0], parse(other).dims[0], sizes)


def test_heads_are_named_by_the_notation_of_diffllama() -> None:
    sizes = {"group": 3, "signal": 1, "kv": 2, "head_dim": 4}
    assert [head_at(ROWS["q_proj.bias"][0], sizes, 4 * head + 3) for head in range(6)] == [
        *(f"signal head 0 of group {g}" for g in range(3)), *(f"noise head of group {g}" for g in range(3)),
    ]  # fmt: skip
    assert [head_at(ROWS["k_proj.weight"][0], sizes, 4 * head) for head in range(4)] == [
        "KV group 0", "KV group 1", "KV group 0", "KV group 1",
    ]  # fmt: skip
    assert head_at(ROWS["o_proj.weight"][1], sizes, 8 * 2) == "signal head 0 of group 2"


def test_each_half_of_the_query_heads_grows_as_the_groups_do() -> None:
    heads = grow_heads(DiffLlama().sizes(config()).heads, signal=2, noise=2, kv=2)
    plan = make_plan(headers(config()), make_recipe({"signal": 2, "noise": 2, "kv": 2}))
    (queries,) = [t.growth.rows for t in plan.tensors if t.name.endswith("layers.0.self_attn.q_proj.weight")]
    groups, dim = list(heads.group), 6
    assert list(queries) == [head * dim + i for half in (0, 6) for group in groups for head in (half + group,)
                             for i in range(dim)]  # fmt: skip


def config(**keys: Any) -> dict[str, Any]:
    return {
        "model_type": "diffllama", "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 40, "hidden_act": "silu",
        "rms_norm_eps": 1e-4, "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}, **keys,
    }  # fmt: skip


def headers(config: dict[str, Any]) -> Header:
    """The header of a complete DiffLlama checkpoint, in memory."""
    from tests.growths import info

    table, sizes = DiffLlama().table(config), DiffLlama().sizes(config)
    tensors = {row.name.format(layer=0): info(row.name.format(layer=0), row.parsed.shape(sizes.axes)) for row in table}
    return Header(Path("source"), config, tensors, {})


def test_the_converted_config_is_one_of_motif() -> None:
    source = config(
        architectures=["DiffLlamaForCausalLM"], lambda_std_dev=0.1, attention_bias=True, bos_token_id=1, x_note="kept"
    )
    made = as_motif(headers(source)).config
    assert made == {
        "model_type": "motif", "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 12, "num_key_value_heads": 4, "num_noise_heads": 6, "head_dim": 6, "vocab_size": 40,
        "hidden_act": "silu", "rms_norm_eps": 1e-4, "attn_rms_norm_eps": 1e-4, "rope_theta": 12345.0,
        "tie_word_embeddings": False, "use_bias": True, "bos_token_id": 1, "x_note": "kept",
    }  # fmt: skip
    assert (GdaConfig.from_dict(made).ratio, GdaConfig.from_dict(made).num_kv_groups) == (1, 2)


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": None, "rope_scaling": None}, 1e4),
        ({"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_theta": 5e5}, 12345.0),
    ],
    ids=str,
)
def test_where_rope_theta_may_stand(keys: dict[str, Any], theta: float) -> None:
    import transformers

    assert as_motif(headers(config(**keys))).config["rope_theta"] == theta
    assert transformers.DiffLlamaConfig(**config(**keys)).rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "RoPE is {'rope_type': 'linear', 'factor': 2.0}"),
        ({"rope_scaling": {"type": "dynamic"}}, "expected rope_type default with a rope_theta"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            "grown as it is, but neither converted nor run",
        ),
        ({"rope_parameters": ["x"]}, r"RoPE is ['x']"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta: expected a positive number, got -1"),
        ({"rope_parameters": None, "rope_theta": True}, "rope_theta: expected a positive number, got True"),
    ],
    ids=str,
)
def test_what_motif_cannot_say(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        as_motif(headers(config(**keys)))
    assert sentence in str(refused.value)


def test_a_motif_checkpoint_is_its_own_view(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    header = read_header(tmp_path)
    assert as_motif(header) is header
    with open_reader(header) as reader:
        assert not isinstance(reader, ViewReader)


def test_the_record_says_what_was_converted(stored: Path, tmp_path: Path) -> None:
    for recipe, converted in (({"to": "motif"}, "diffllama"), ({"uniform": 2}, None)):
        target = tmp_path / str(converted)
        plan = make_plan(read_header(stored), make_recipe(dict(recipe)))
        expand(plan, target, weights_output(plan, 10**9))
        record = json.loads((target / "growth.json").read_text())
        assert (record["converted_from"], record["architecture"]) == (converted, "motif" if converted else "diffllama")
        assert record["recipe"] == recipe
        assert record["source"]["files"].keys() == {"model.safetensors"}
        assert (target / "generation_config.json").read_bytes() == (stored / "generation_config.json").read_bytes()
    assert (
        load_file(tmp_path / "diffllama" / "model.safetensors").keys() == as_motif(read_header(stored)).tensors.keys()
    )


def test_the_bytes_do_not_depend_on_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """320 rows of queries in chunks of 128, which end inside a head of 40."""
    save_diffllama(tmp_path / "source", (512, 8, 1, 8, 4, 40, False), dtype=torch.bfloat16)
    plan = make_plan(read_header(tmp_path / "source"), make_recipe({"to": "motif", "signal": 2, "hidden": 2}))
    expand(plan, tmp_path / "whole", weights_output(plan, 10**9))
    monkeypatch.setattr("gdagrow.streaming.CHUNK_BYTES", 1)
    expand(plan, tmp_path / "pieces", weights_output(plan, 10**9))
    whole, pieces = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces
    assert check_weights(tmp_path / "source", tmp_path / "pieces").equivalent
