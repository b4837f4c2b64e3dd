"""The Motif table against the real model: every parameter covered exactly once, with its shape, in both directions."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.archs import architecture_of, in_model_order
from gdagrow.models.gda import GdaConfig, GdaModel
from gdagrow.models.layers import PROJECTIONS
from tests.growths import RANDOM

BASE: dict[str, Any] = {
    "model_type": "motif", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 20, "num_noise_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 50,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "poly_norm", "tie_word_embeddings": False,
}  # fmt: skip
PLAIN = {key: value for key, value in BASE.items() if key not in ("num_noise_heads", "head_dim")}

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": BASE,
    "tied": BASE | {"tie_word_embeddings": True},
    "silu": BASE | {"hidden_act": "silu"},
    "one layer, one group": BASE | {
        "num_hidden_layers": 1, "num_noise_heads": 1, "num_attention_heads": 3, "num_key_value_heads": 2,
    },
    "plain differential": PLAIN | {"num_attention_heads": 4, "num_key_value_heads": 4, "model_type": "Motif"},
    "plain with shared KV": PLAIN | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Motif-2-12.7B": BASE | {
        "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 16, "num_noise_heads": 8, "head_dim": 128, "vocab_size": 219520,
    },
}  # fmt: skip


def table_shapes(config: dict[str, Any], bias: frozenset[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Every parameter by the table, name and shape, repeated if two rows give it."""
    architecture = architecture_of(config)
    sizes = architecture.sizes(config)
    return [
        (row.name.format(layer=layer), row.parsed.shape(sizes.axes))
        for row in architecture.table(config)
        if not row.optional or row.name.split(".")[-2] in bias
        for layer in range(sizes.num_layers if row.is_layered else 1)
    ]


def model_shapes(config: dict[str, Any], bias: frozenset[str]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = GdaModel(GdaConfig.from_dict(config), bias=bias)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("bias", [frozenset(), PROJECTIONS], ids=["no biases", "biases"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_table_is_the_model(config: dict[str, Any], bias: frozenset[str]) -> None:
    table, model = table_shapes(config, bias), model_shapes(config, bias)
    assert [name for name, count in Counter(name for name, _ in table).items() if count > 1] == [], "covered twice"
    assert dict(table) == model


@pytest.mark.parametrize("bias", [frozenset(), PROJECTIONS], ids=["no biases", "biases"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_order_of_the_table_is_that_of_the_parameters(config: dict[str, Any], bias: frozenset[str]) -> None:
    with torch.device("meta"):
        model = GdaModel(GdaConfig.from_dict(config), bias=bias)
    rows = [row for row in architecture_of(config).table(config) if not row.optional or row.name.split(".")[-2] in bias]
    ordered = [row.name.format(layer=layer) for row, layer in in_model_order(tuple(rows), config["num_hidden_layers"])]
    assert ordered == [name for name, _ in model.named_parameters()]


@settings(RANDOM)
@given(st.frozensets(st.sampled_from(sorted(PROJECTIONS))))
def test_any_projection_may_have_a_bias(bias: frozenset[str]) -> None:
    assert dict(table_shapes(BASE, bias)) == model_shapes(BASE, bias)


def test_the_table_has_no_row_that_no_model_has() -> None:
    rows = {row.name for config in CONFIGS.values() for row in architecture_of(config).table(config)}
    found = {name for config in CONFIGS.values() for name in model_shapes(config, PROJECTIONS)}
    assert {name for name in rows if name.format(layer=0) not in found} == set()


def test_the_rows_that_growth_treats_specially_exist() -> None:
    architecture = architecture_of(BASE)
    untied, tied = (
        {row.name for row in architecture.table(BASE | {"tie_word_embeddings": tied})} for tied in (False, True)
    )
    assert {architecture.embedding, architecture.head, architecture.last_norm} <= untied
    assert untied - tied == {architecture.head}


def test_parts() -> None:
    architecture = architecture_of(BASE)
    assert {row.part for row in architecture.table(BASE)} == {"embedding", "attention", "mlp", "norm", "head"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_table_and_model_read_the_same_sizes_from_a_config(config: dict[str, Any]) -> None:
    sizes, model = architecture_of(config).sizes(config), GdaConfig.from_dict(config)
    assert (sizes.hidden, sizes.ffn, sizes.vocab, sizes.num_layers, sizes.head_dim) == (
        model.hidden_size, model.intermediate_size, model.vocab_size, model.num_hidden_layers, model.head_dim,
    )  # fmt: skip
    assert (sizes.heads.num_groups, sizes.heads.ratio, sizes.heads.num_kv_groups) == (
        model.num_groups, model.ratio, model.num_kv_groups,
    )  # fmt: skip
