"""The Llama table against the model of `transformers`, what it costs against what torch counts, and who may read it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from gdagrow.archs import architecture_of, in_model_order, trained_of
from gdagrow.archs.motif import Motif
from gdagrow.costs import checkpoint_figures
from gdagrow.errors import CheckpointError
from gdagrow.train.configs import header_of_config
from gdagrow.train.dry_run import forecast
from gdagrow.train.recipe import make_train_recipe
from tests.command import call
from tests.trainings import CONFIG, recipe

BASE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 6, "vocab_size": 50,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "shared KV": BASE,
    "tied": BASE | {"tie_word_embeddings": True},
    "one KV head": BASE | {"num_key_value_heads": 1, "num_hidden_layers": 1},
    "as many KV heads": BASE | {"num_key_value_heads": 12},
    "defaults": {},
}


def model_of(keys: dict[str, Any], **given: Any) -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys, **given))


@pytest.mark.parametrize("keys", CONFIGS.values(), ids=list(CONFIGS))
def test_the_table_is_the_model(keys: dict[str, Any]) -> None:
    model = model_of(keys)
    config = model.config.to_dict()
    sizes, table = trained_of(config).sizes(config), trained_of(config).table(config)
    rows = [
        (row.name.format(layer=layer), row.parsed.shape(sizes.axes))
        for row, layer in in_model_order(table, sizes.num_layers)
    ]
    # In this order an optimizer numbers its state; tied, the shared tensor stands once.
    assert rows == [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def test_heads_and_costs_by_hand() -> None:
    found = checkpoint_figures(header_of_config({**BASE, "model_type": "llama"}))
    heads = found.sizes.heads
    assert (heads.num_query_heads, heads.num_signal_heads, heads.num_kv_groups, heads.told_ratio) == (
        12, 12, 4, "no noise",
    )  # fmt: skip
    layer = 48 * 72 + 2 * 48 * 24 + 72 * 48 + 3 * 48 * 40
    assert found.num_parameters == 2 * (layer + 2 * 48) + 48 + 2 * 50 * 48
    assert found.matmul_flops_per_token == 2 * (2 * layer + 50 * 48)
    assert found.attention_flops_per_token == 2 * 12 * 2 * (6 + 6) * 4096
    assert found.kv_cache_bytes_per_token == 2 * 2 * 24 * 4


def test_flops_of_a_step_as_torch_counts_them() -> None:
    keys = {**BASE, "vocab_size": 256}
    made = make_train_recipe(recipe(model={"config": {**keys, "model_type": "llama"}}, batch_size=4), "r")
    (leg,) = forecast(made, 1).legs
    ids = torch.zeros(4, 32, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model_of(keys, attn_implementation="eager")(input_ids=ids)
    # It counts whole maps; a position sees half of them on average.
    attention = 4 * 2 * 12 * 2 * (6 + 6) * 32 * 32
    assert leg.flops_per_step == 3 * (counter.get_total_flops() - attention // 2)


def test_differential_heads_cost_what_they_did() -> None:
    found = checkpoint_figures(header_of_config(dict(CONFIG)))
    assert found.attention_flops_per_token == 2 * 8 * 2 * (8 + 16) * 4096
    assert found.sizes.heads.told_ratio == "3:1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"hidden_act": "gelu"}, "hidden_act: expected silu, got 'gelu'"),
     ({"attention_bias": True}, "attention_bias: expected false, got True"),
     ({"mlp_bias": True}, "mlp_bias: expected false, got True"),
     ({"num_attention_heads": 10}, "hidden_size: expected a multiple of the 10 attention heads, got 48"),
     ({"num_key_value_heads": 5}, "num_key_value_heads: expected a divisor of 12, got 5"),
     ({"vocab_size": 0, "intermediate_size": None}, "intermediate_size: expected a whole number of 1 or more, got None"
                                                    "; vocab_size: expected a whole number of 1 or more, got 0")],
)  # fmt: skip
def test_configs_that_make_no_sense(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        header_of_config({**BASE, "model_type": "llama", **changes})
    assert str(refused.value).startswith("config.json: ")
    assert told in str(refused.value)


def test_no_growth_and_no_reference_model_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(trained_of(CONFIG), Motif), "what grows is trained by its own table"
    with pytest.raises(CheckpointError, match="model_type 'llama' has no table; gdagrow knows motif, diffllama"):
        architecture_of({**BASE, "model_type": "llama"})
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    words = ([("expand", tmp_path / "model", tmp_path / "grown", "--signal-x2")] + [
        (command, tmp_path / "model") for command in ("inspect", "stats")
    ] + [("plan", tmp_path / "model", "--signal-x2"), ("diff", tmp_path / "model", tmp_path / "model")])  # fmt: skip
    for command in words:
        outcome = call(capsys, *command)
        assert (outcome.code, outcome.out) == (2, ""), command
        assert "model_type 'llama' has no table; gdagrow knows motif, diffllama" in outcome.err, command
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
