"""DiffLlama: the differential-attention Llama of the `transformers` package, the ratio 1:1 by its layout.

Pair `p` of `H/2` is signal query head `p` and noise query head `p + H/2`. It reads KV group `c = p // (H / num_kv)`:
signal key head `c`, noise key head `c + num_kv/2`, and the value heads of the same numbers side by side. So what Motif
interleaves head by head, DiffLlama stores as halves.

Source: `transformers/models/diffllama`, against which tests/contract/test_diffllama_table.py holds the table.
"""

from collections.abc import Mapping
from typing import Any

from gdagrow.archs import Parameter, Sizes, whole_number
from gdagrow.errors import CheckpointError
from gdagrow.heads import Heads

_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."

# In the order of the model's `named_parameters()`, which numbers the state of an optimizer.
_ROWS = (
    Parameter("model.embed_tokens.weight", "vocab -> hidden", "embedding"),
    Parameter(_ATTENTION + "lambda_q1", "head_dim", "attention"),
    Parameter(_ATTENTION + "lambda_k1", "head_dim", "attention"),
    Parameter(_ATTENTION + "lambda_q2", "head_dim", "attention"),
    Parameter(_ATTENTION + "lambda_k2", "head_dim", "attention"),
    Parameter(_ATTENTION + "q_proj.weight", "(((group signal) + group) head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "q_proj.bias", "(((group signal) + group) head_dim) <-", "attention"),
    Parameter(_ATTENTION + "k_proj.weight", "(2 kv head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "k_proj.bias", "(2 kv head_dim) <-", "attention"),
    Parameter(_ATTENTION + "v_proj.weight", "(2 kv head_dim) <- hidden", "attention"),
    Parameter(_ATTENTION + "v_proj.bias", "(2 kv head_dim) <-", "attention"),
    Parameter(_ATTENTION + "o_proj.weight", "hidden <- (group signal 2 head_dim)", "attention"),
    Parameter(_ATTENTION + "o_proj.bias", "hidden <-", "attention"),
    Parameter(_MLP + "gate_proj.weight", "ffn <- hidden", "mlp"),
    Parameter(_MLP + "up_proj.weight", "ffn <- hidden", "mlp"),
    Parameter(_MLP + "down_proj.weight", "hidden <- ffn", "mlp"),
    Parameter("model.layers.{layer}.input_layernorm.weight", "hidden <-", "norm"),
    Parameter("model.layers.{layer}.post_attention_layernorm.weight", "hidden <-", "norm"),
    Parameter("model.norm.weight", "hidden <-", "norm"),
)
_HEAD = Parameter("lm_head.weight", "vocab <- hidden", "head")


class DiffLlama:
    """The DiffLlama family: plain differential attention with SiLU gated MLPs."""

    name = "diffllama"
    embedding = "model.embed_tokens.weight"
    head = _HEAD.name
    last_norm = "model.norm.weight"
    subln: str | None = None
    lambdas = _ATTENTION + "{name}"
    norm_eps: str | None = None  # its sub-norm has the same
    only_ratio: int | None = 1

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        problems: list[str] = []

        def whole(key: str, default: int | None = None) -> int:
            return whole_number(config, key, problems, default)

        hidden, ffn, vocab = whole("hidden_size"), whole("intermediate_size"), whole("vocab_size")
        num_layers, num_heads = whole("num_hidden_layers"), whole("num_attention_heads")
        # Absent from configs written before `transformers` had them.
        num_kv_heads = whole("num_key_value_heads", default=num_heads)
        head_dim = whole("head_dim", default=max(1, hidden // num_heads))
        if config.get("hidden_act") != "silu":
            problems.append(f"hidden_act: expected silu, got {config.get('hidden_act')!r}")
        for key in ("attention_bias", "tie_word_embeddings"):
            if not isinstance(config.get(key, False), bool):
                problems.append(f"{key}: expected true or false, got {config[key]!r}")
        eps = config.get("rms_norm_eps")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            problems.append(f"rms_norm_eps: expected a number between 0 and 1, got {eps!r}")
        if not problems:
            problems += _head_problems(num_heads, num_kv_heads, head_dim)
        if problems:
            raise CheckpointError("config.json: " + "; ".join(problems))
        return Sizes(Heads(num_heads // 2, 1, num_kv_heads // 2), head_dim, hidden, ffn, vocab, num_layers)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("tie_word_embeddings", False))

    def averages_ffn(self, config: Mapping[str, Any]) -> bool:
        return False

    def table(self, config: Mapping[str, Any]) -> tuple[Parameter, ...]:
        head = () if self.is_tied(config) else (_HEAD,)
        # Never optional: `transformers` goes by `attention_bias` alone, so a stored bias without it has no effect.
        rows = (row for row in _ROWS if config.get("attention_bias", False) or not row.name.endswith(".bias"))
        return (*rows, *head)

    def grown_config(self, config: Mapping[str, Any], grown: Sizes, *, tied: bool) -> dict[str, Any]:
        heads = grown.heads
        keys: dict[str, Any] = {
            "hidden_size": grown.hidden,
            "intermediate_size": grown.ffn,
            "num_attention_heads": heads.num_query_heads,
            "num_key_value_heads": 2 * heads.num_kv_groups,
        }
        if "head_dim" in config or grown.hidden // heads.num_query_heads != grown.head_dim:
            keys["head_dim"] = grown.head_dim
        if tied != self.is_tied(config):
            keys["tie_word_embeddings"] = tied
        return {**config, **keys}


def _head_problems(num_heads: int, num_kv_heads: int, head_dim: int) -> list[str]:
    problems = []
    if num_kv_heads % 2 or num_heads % num_kv_heads:
        problems.append(
            f"num_key_value_heads {num_kv_heads}: expected an even divisor of the {num_heads} attention heads (a "
            "signal key and a noise key for each KV group)"
        )
    if head_dim % 2:
        problems.append(f"head_dim {head_dim}: expected an even number, because RoPE turns pairs")
    return problems
