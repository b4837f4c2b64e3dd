"""Motif: one table for Motif-2-12.7B (GDA) and Motif-2.6B (plain differential attention, the ratio 1:1).

Source: the public checkpoints' layout; docs/notation.md walks through the table.
"""

from collections.abc import Mapping
from typing import Any

from gdagrow.archs import Parameter, Sizes, whole_number
from gdagrow.errors import CheckpointError
from gdagrow.heads import Heads

_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."

# In the order of the model's `named_parameters()`, which numbers the state of an optimizer.
_EMBEDDING = (Parameter("model.embed_tokens.weight", "vocab -> hidden", "embedding"),)
_LAYER = (
    Parameter(_ATTENTION + "lambda_q1", "head_dim", "attention"),
    Parameter(_ATTENTION + "lambda_k1", "head_dim", "attention"),
    Parameter(_ATTENTION + "lambda_q2", "head_dim", "attention"),
    Parameter(_ATTENTION + "lambda_k2", "head_dim", "attention"),
    Parameter(_ATTENTION + "q_proj.weight", "(group (signal + 1) head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "q_proj.bias", "(group (signal + 1) head_dim) <-", "attention", optional=True),
    Parameter(_ATTENTION + "k_proj.weight", "(kv 2 head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "k_proj.bias", "(kv 2 head_dim) <-", "attention", optional=True),
    Parameter(_ATTENTION + "v_proj.weight", "(kv 2 head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "v_proj.bias", "(kv 2 head_dim) <-", "attention", optional=True),
    Parameter(_ATTENTION + "o_proj.weight", "hidden <- (group signal 2 head_dim)", "attention"),
    Parameter(_ATTENTION + "o_proj.bias", "hidden <-", "attention", optional=True),
    Parameter(_ATTENTION + "subln.weight", "(2 head_dim)", "attention"),
    Parameter(_MLP + "gate_proj.weight", "ffn <- hidden", "mlp"),
    Parameter(_MLP + "gate_proj.bias", "ffn <-", "mlp", optional=True),
    Parameter(_MLP + "up_proj.weight", "ffn <- hidden", "mlp"),
    Parameter(_MLP + "up_proj.bias", "ffn <-", "mlp", optional=True),
    Parameter(_MLP + "down_proj.weight", "hidden <- ffn", "mlp"),
    Parameter(_MLP + "down_proj.bias", "hidden <-", "mlp", optional=True),
)
_ACTIVATIONS = {
    "poly_norm": (Parameter(_MLP + "act_fn.weight", "3", "mlp"), Parameter(_MLP + "act_fn.bias", "1", "mlp")),
    "silu": (),
}
_NORMS = (
    Parameter("model.layers.{layer}.input_layernorm.weight", "hidden <-", "norm"),
    Parameter("model.layers.{layer}.post_attention_layernorm.weight", "hidden <-", "norm"),
    Parameter("model.norm.weight", "hidden <-", "norm"),
)
_HEAD = Parameter("lm_head.weight", "vocab <- hidden", "head")


class Motif:
    """The Motif family: grouped and plain differential attention with PolyNorm or SiLU gated MLPs."""

    name = "motif"
    embedding = "model.embed_tokens.weight"
    head = _HEAD.name
    last_norm = "model.norm.weight"
    subln: str | None = _ATTENTION + "subln.weight"
    lambdas = _ATTENTION + "{name}"
    norm_eps: str | None = "rms_norm_eps"
    only_ratio: int | None = None

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        problems: list[str] = []

        def whole(key: str, default: int | None = None) -> int:
            return whole_number(config, key, problems, default)

        hidden, ffn, vocab = whole("hidden_size"), whole("intermediate_size"), whole("vocab_size")
        num_layers, num_heads = whole("num_hidden_layers"), whole("num_attention_heads")
        num_kv_heads = whole("num_key_value_heads", default=num_heads)
        num_groups = whole("num_noise_heads", default=max(1, num_heads // 2))
        head_dim = whole("head_dim", default=max(1, hidden // num_heads))
        if config.get("k_ratio", 1) not in (1, None):
            problems.append(f"k_ratio: expected 1, as in every published model, got {config['k_ratio']!r}")
        if config.get("hidden_act") not in tuple(_ACTIVATIONS):
            problems.append(f"hidden_act: expected {' or '.join(_ACTIVATIONS)}, got {config.get('hidden_act')!r}")
        if not problems:
            problems += _head_problems(num_heads, num_groups, num_kv_heads)
        if problems:
            raise CheckpointError("config.json: " + "; ".join(problems))
        heads = Heads(num_groups, num_heads // num_groups - 1, num_kv_heads // 2)
        return Sizes(heads, head_dim, hidden, ffn, vocab, num_layers)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("tie_word_embeddings", False))

    def averages_ffn(self, config: Mapping[str, Any]) -> bool:
        return bool(config["hidden_act"] == "poly_norm")

    def table(self, config: Mapping[str, Any]) -> tuple[Parameter, ...]:
        head = () if self.is_tied(config) else (_HEAD,)
        return _EMBEDDING + _LAYER + _ACTIVATIONS[config["hidden_act"]] + _NORMS + head

    def grown_config(self, config: Mapping[str, Any], grown: Sizes, *, tied: bool) -> dict[str, Any]:
        heads = grown.heads
        keys: dict[str, Any] = {
            "hidden_size": grown.hidden,
            "intermediate_size": grown.ffn,
            "num_attention_heads": heads.num_query_heads,
            "num_key_value_heads": 2 * heads.num_kv_groups,
        }
        # A plain differential config stays plain while its defaults still say the same.
        if "num_noise_heads" in config or heads.ratio != 1:
            keys["num_noise_heads"] = heads.num_groups
        if "head_dim" in config or heads.ratio != 1 or grown.hidden // heads.num_query_heads != grown.head_dim:
            keys["head_dim"] = grown.head_dim
        if tied != self.is_tied(config):
            keys["tie_word_embeddings"] = tied
        return {**config, **keys}


def _head_problems(num_heads: int, num_groups: int, num_kv_heads: int) -> list[str]:
    if num_heads % num_groups or num_heads == num_groups:
        return [
            f"num_attention_heads {num_heads} and num_noise_heads {num_groups}: expected a whole number of signal "
            "heads for each noise head"
        ]
    if num_kv_heads % 2 or num_groups % (num_kv_heads // 2):
        return [
            f"num_key_value_heads {num_kv_heads}: expected twice a divisor of the {num_groups} noise heads "
            "(a signal key and a noise key for each KV group)"
        ]
    return []
