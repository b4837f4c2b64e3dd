"""Llama: standard attention, the baseline that grouped differential attention is held against; trained, never grown.

One map a query head, on values of `head_dim`: `ratio` signal heads for each KV group, and no noise heads.

Source: `transformers/models/llama`, against which tests/contract/test_llama_table.py holds the table.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from gdagrow.archs import Parameter, Sizes, whole_number
from gdagrow.errors import CheckpointError
from gdagrow.heads import Heads

_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."

# In the order of the model's `named_parameters()`, which numbers the state of an optimizer.
_ROWS = (
    Parameter("model.embed_tokens.weight", "vocab -> hidden", "embedding"),
    Parameter(_ATTENTION + "q_proj.weight", "(group signal head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "k_proj.weight", "(kv head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "v_proj.weight", "(kv head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "o_proj.weight", "hidden <- (group signal head_dim)", "attention"),
    Parameter(_MLP + "gate_proj.weight", "ffn <- hidden", "mlp"),
    Parameter(_MLP + "up_proj.weight", "ffn <- hidden", "mlp"),
    Parameter(_MLP + "down_proj.weight", "hidden <- ffn", "mlp"),
    Parameter("model.layers.{layer}.input_layernorm.weight", "hidden <-", "norm"),
    Parameter("model.layers.{layer}.post_attention_layernorm.weight", "hidden <-", "norm"),
    Parameter("model.norm.weight", "hidden <-", "norm"),
)
_HEAD = Parameter("lm_head.weight", "vocab <- hidden", "head")


class StandardHeads(Heads):
    """`num_groups` KV groups of `ratio` query heads, each with a map of its own and no noise."""

    value_heads: ClassVar[int] = 1

    @property
    def num_query_heads(self) -> int:
        return self.num_signal_heads

    @property
    def told_ratio(self) -> str:
        return "no noise"


class Llama:
    """The Llama family, as it is without biases."""

    name = "llama"

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        problems: list[str] = []

        def whole(key: str, default: int | None = None) -> int:
            return whole_number(config, key, problems, default)

        hidden, ffn, vocab = whole("hidden_size"), whole("intermediate_size"), whole("vocab_size")
        num_layers, num_heads = whole("num_hidden_layers"), whole("num_attention_heads")
        num_kv_heads = whole("num_key_value_heads", default=num_heads)
        head_dim = whole("head_dim", default=max(1, hidden // num_heads))
        if (activation := config.get("hidden_act", "silu")) != "silu":
            problems.append(f"hidden_act: expected silu, got {activation!r}")
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key, False) is not False:
                problems.append(f"{key}: expected false, got {config[key]!r}")
        if hidden % num_heads:  # transformers refuses it, whatever head_dim says
            problems.append(f"hidden_size: expected a multiple of the {num_heads} attention heads, got {hidden}")
        if num_heads % num_kv_heads:
            problems.append(f"num_key_value_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
        if problems:
            raise CheckpointError("config.json: " + "; ".join(problems))
        heads = StandardHeads(num_kv_heads, num_heads // num_kv_heads, num_kv_heads)
        return Sizes(heads, head_dim, hidden, ffn, vocab, num_layers)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("tie_word_embeddings", False))

    def table(self, config: Mapping[str, Any]) -> tuple[Parameter, ...]:
        return _ROWS if self.is_tied(config) else (*_ROWS, _HEAD)
