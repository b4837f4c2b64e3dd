"""`GdaConfig` reads the published Motif configs and refuses what the model cannot do, key by key."""

from typing import Any

import pytest

from gdagrow.errors import CheckpointError
from gdagrow.models.gda import GdaConfig

MOTIF_2_12B: dict[str, Any] = {
    "model_type": "Motif", "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 16, "num_noise_heads": 8, "head_dim": 128, "vocab_size": 219520,
    "rope_theta": 1000000, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "poly_norm", "k_ratio": 1,
    "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip
MOTIF_2B = {
    key: value for key, value in MOTIF_2_12B.items() if key not in ("num_noise_heads", "head_dim", "k_ratio")
} | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 16,
     "tie_word_embeddings": True}  # fmt: skip


def test_grouped() -> None:
    config = GdaConfig.from_dict(MOTIF_2_12B)
    assert (config.num_groups, config.ratio, config.num_kv_groups, config.num_signal_heads) == (8, 4, 8, 32)
    assert (config.attn_rms_norm_eps, config.tie_word_embeddings, config.use_bias) == (1e-5, False, False)


def test_plain_differential() -> None:
    config = GdaConfig.from_dict(MOTIF_2B)
    assert (config.num_groups, config.ratio, config.num_kv_groups, config.num_signal_heads) == (8, 1, 8, 8)
    assert (config.head_dim, config.tie_word_embeddings) == (128, True)


def test_rope_theta_as_transformers_5_writes_it() -> None:
    config = {key: value for key, value in MOTIF_2B.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert GdaConfig.from_dict(config).rope_theta == 500000.0


def test_all_missing_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json lacks vocab_size, rms_norm_eps: it is no Motif config"):
        GdaConfig.from_dict({k: v for k, v in MOTIF_2B.items() if k not in ("vocab_size", "rms_norm_eps")})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("model_type", "llama", "model_type is 'llama', expected 'Motif' or 'motif'"),
        ("k_ratio", 2, "k_ratio is 2, expected 1, as in every published Motif model"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling is {'type': 'yarn'}, which the reference model does not"),
        ("rope_parameters", {"rope_type": "yarn"}, "asks for 'yarn' RoPE, which the reference model does not support"),
        ("rope_parameters", [1.0], "rope_parameters is [1.0], expected an object"),
        ("use_sliding_window", True, "use_sliding_window is true, which the reference model does not support"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', expected poly_norm or silu"),
        ("num_noise_heads", 7, "num_noise_heads is 7, expected a divisor of num_attention_heads (40)"),
        ("num_noise_heads", 40, "num_noise_heads is 40, expected a divisor of num_attention_heads (40)"),
        ("num_noise_heads", 0, "num_noise_heads is 0, expected a positive integer"),
        ("num_key_value_heads", 15, "num_key_value_heads is 15, expected twice a divisor of the number of"),
        ("num_key_value_heads", 6, "num_key_value_heads is 6, expected twice a divisor of the number of"),
        ("head_dim", 7, "head_dim is 7, expected an even number"),
        ("hidden_size", "4096", "hidden_size is '4096', expected a positive integer"),
        ("vocab_size", True, "vocab_size is True, expected a positive integer"),
        ("rms_norm_eps", -1, "rms_norm_eps is -1, expected a positive number"),
        ("rope_theta", None, "rope_theta is None, expected a positive number"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no', expected true or false"),
    ],
)  # fmt: skip
def test_refusals(key: str, value: Any, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        GdaConfig.from_dict({**MOTIF_2_12B, key: value})
    assert text in str(caught.value)
