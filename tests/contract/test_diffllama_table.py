"""The DiffLlama table against the model of `transformers`: every parameter covered exactly once, with its shape."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from gdagrow.archs import architecture_of, in_model_order

BASE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 50,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "shared KV": BASE,
    "tied": BASE | {"tie_word_embeddings": True},
    "biases": BASE | {"attention_bias": True, "num_hidden_layers": 1},
    "two KV heads": BASE | {"num_key_value_heads": 2},
    "as many KV heads": BASE | {"num_key_value_heads": 12, "tie_word_embeddings": True, "attention_bias": True},
    "defaults": {},
}


def model_of(keys: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**keys))


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = transformers.DiffLlamaConfig(**keys).to_dict()
    return config


def table_shapes(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Every parameter by the table, name and shape, repeated if two rows give it."""
    architecture = architecture_of(config)
    sizes = architecture.sizes(config)
    return [
        (row.name.format(layer=layer), row.parsed.shape(sizes.axes))
        for row in architecture.table(config)
        for layer in range(sizes.num_layers if row.is_layered else 1)
    ]


@pytest.mark.parametrize("keys", CONFIGS.values(), ids=list(CONFIGS))
def test_the_table_is_the_model(keys: dict[str, Any]) -> None:
    table = table_shapes(config_of(keys))
    # Tied, `parameters` names the shared tensor once, as a checkpoint stores it.
    model = {name: tuple(parameter.shape) for name, parameter in model_of(keys).named_parameters()}
    assert [name for name, count in Counter(name for name, _ in table).items() if count > 1] == [], "covered twice"
    assert dict(table) == model
    rows = in_model_order(
        architecture_of(config_of(keys)).table(config_of(keys)), model_of(keys).config.num_hidden_layers
    )
    assert [row.name.format(layer=layer) for row, layer in rows] == list(model), "an optimizer numbers its state so"
    assert dict(model_of(keys).named_buffers(remove_duplicate=False)).keys() <= {
        "model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq",
    }, "a buffer that a checkpoint would have to bring"  # fmt: skip


@pytest.mark.parametrize("keys", CONFIGS.values(), ids=list(CONFIGS))
def test_table_and_model_read_the_same_sizes_from_a_config(keys: dict[str, Any]) -> None:
    architecture, model = architecture_of(config_of(keys)), model_of(keys)
    sizes, attention = architecture.sizes(config_of(keys)), model.model.layers[0].self_attn
    assert (architecture.name, sizes.heads.ratio, architecture.only_ratio) == ("diffllama", 1, 1)
    assert sizes.head_dim == attention.head_dim
    assert 2 * sizes.heads.num_groups == sizes.heads.num_query_heads == model.config.num_attention_heads
    assert 2 * sizes.heads.num_kv_groups == model.config.num_key_value_heads
    assert sizes.heads.groups_per_kv == attention.num_key_value_groups
    assert (sizes.hidden, sizes.ffn, sizes.vocab, sizes.num_layers) == (
        model.config.hidden_size, model.config.intermediate_size, model.config.vocab_size, len(model.model.layers),
    )  # fmt: skip
    assert architecture.is_tied(config_of(keys)) == (model.lm_head.weight is model.model.embed_tokens.weight)


def test_keys_that_older_configs_lack() -> None:
    config = config_of(BASE | {"num_key_value_heads": 12, "head_dim": 2})
    assert config["hidden_size"] == 2 * config["num_attention_heads"]
    short = {key: value for key, value in config.items()
             if key not in ("num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings")}  # fmt: skip
    assert table_shapes(short) == table_shapes(config)
    grown = architecture_of(short).sizes(config_of(BASE | {"hidden_size": 48, "head_dim": 2}))
    assert architecture_of(short).grown_config(short, grown, tied=False)["head_dim"] == 2, "48 / 12 is no longer 2"
