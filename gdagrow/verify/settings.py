"""The settings of two configs that no weight shows, and that change what a model computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Sizes, which are held against the maps and the tensors instead.
_SIZES: Final = frozenset({
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_noise_heads", "head_dim", "vocab_size", "k_ratio", "use_bias",
})  # fmt: skip
# What tools write beside a model, and what only matters in training or sampling.
_NO_FUNCTION: Final = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "hidden_dropout", "initializer_range", "lambda_std_dev", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache",
})  # fmt: skip
_CONTEXT: Final = "max_position_embeddings"
# What an absent key means (GdaConfig).
_DEFAULTS: Final[Mapping[str, Any]] = {"attn_rms_norm_eps": 1e-5}


@dataclass(frozen=True)
class Setting:
    """A key of `config.json` that growth never changes, and its two values; None where the key is absent."""

    key: str
    source: Any
    grown: Any


def other_settings(source: Mapping[str, Any], grown: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Find what differs between two configs besides sizes and what is known to have no part in the function.

    A key that is unknown here counts, because nothing says that it has no part in it. `tie_word_embeddings` counts only
    where the grown model is tied and its source is not: growth may untie. `max_position_embeddings` counts only where
    RoPE is scaled by it.
    """
    before, after = _normal(source), _normal(grown)
    if not any(keys.get(key) for keys in (before, after) for key in ("rope_scaling", "rope_parameters")):
        before.pop(_CONTEXT, None)
        after.pop(_CONTEXT, None)
    if before["tie_word_embeddings"]:
        del before["tie_word_embeddings"], after["tie_word_embeddings"]
    return tuple(
        Setting(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if key not in _SIZES | _NO_FUNCTION and before.get(key) != after.get(key)
    )


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {**_DEFAULTS, **config, "tie_word_embeddings": bool(config.get("tie_word_embeddings"))}
    rope = keys.get("rope_parameters")
    # Where transformers 5 writes `rope_theta`.
    if isinstance(rope, Mapping) and rope.keys() <= {"rope_theta", "rope_type"} and rope.get("rope_type") in (
        None, "default",
    ):  # fmt: skip
        del keys["rope_parameters"]
        keys.setdefault("rope_theta", rope.get("rope_theta"))
    return keys
