"""What a Motif `config.json` says about a grouped differential attention (GDA) model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gdagrow.errors import CheckpointError

ACTIVATIONS = ("poly_norm", "silu")
_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "hidden_act",
)  # fmt: skip


@dataclass(frozen=True)
class GdaConfig:
    """The sizes and constants of one GDA model, under the names of Motif's `config.json`.

    `num_attention_heads` counts signal and noise query heads together, `num_key_value_heads` counts two key
    heads (one signal, one noise) for each of the `num_kv_groups`. `use_bias` is only the default for a model built
    from the config alone: a checkpoint decides by the biases that it stores.

    Source: Grouped Differential Attention (arXiv:2510.06949) and the published Motif-2-12.7B and Motif-2.6B.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_noise_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    attn_rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    use_bias: bool

    @property
    def num_groups(self) -> int:
        """N: query groups, each with `ratio` signal heads and one noise head."""
        return self.num_noise_heads

    @property
    def ratio(self) -> int:
        """r: signal heads per noise head."""
        return self.num_attention_heads // self.num_noise_heads - 1

    @property
    def num_kv_groups(self) -> int:
        """C: KV groups, each with a signal key, a noise key and a value of width `2 * head_dim`."""
        return self.num_key_value_heads // 2

    @property
    def num_signal_heads(self) -> int:
        """N * r, the heads that `o_proj` reads."""
        return self.num_attention_heads - self.num_noise_heads

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GdaConfig":
        """Read the dict of a Motif `config.json`; keys that the model does not need are ignored.

        Absent keys: no `num_noise_heads` is plain differential attention (half of the heads are noise), no
        `head_dim` is `hidden_size / num_attention_heads`, `attn_rms_norm_eps` is 1e-5, `tie_word_embeddings` and
        `use_bias` are false (the defaults of Motif's own configuration class).

        Raises:
            CheckpointError: a key is missing or has a bad value, the heads do not divide into groups, or the config
                asks for something that the model does not have (`rope_scaling`, a sliding window, `k_ratio` not 1).
        """
        missing = [key for key in _REQUIRED if config.get(key) is None]
        if missing:
            raise CheckpointError(
                f"config.json lacks {', '.join(missing)}: it is no Motif config; add the missing keys."
            )
        _refuse_unsupported(config)
        num_heads = _count(config, "num_attention_heads")
        num_noise = num_heads // 2 if config.get("num_noise_heads") is None else _count(config, "num_noise_heads")
        hidden = _count(config, "hidden_size")
        head_dim = hidden // num_heads if config.get("head_dim") is None else _count(config, "head_dim")
        result = cls(
            hidden_size=hidden,
            intermediate_size=_count(config, "intermediate_size"),
            num_hidden_layers=_count(config, "num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=_count(config, "num_key_value_heads"),
            num_noise_heads=num_noise,
            head_dim=head_dim,
            vocab_size=_count(config, "vocab_size"),
            rope_theta=_rope_theta(config),
            rms_norm_eps=_positive("rms_norm_eps", config["rms_norm_eps"]),
            attn_rms_norm_eps=_positive("attn_rms_norm_eps", config.get("attn_rms_norm_eps", 1e-5)),
            hidden_act=config["hidden_act"],
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            use_bias=_flag(config, "use_bias"),
        )
        _check_heads(result)
        return result


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type", "motif")
    if str(model_type).lower() != "motif":
        raise _bad("model_type", model_type, "'Motif' or 'motif'")
    if config.get("k_ratio", 1) != 1:
        raise _bad("k_ratio", config["k_ratio"], "1, as in every published Motif model")
    if config.get("rope_scaling") is not None:
        raise CheckpointError(
            f"config.json: rope_scaling is {config['rope_scaling']!r}, which the reference model does not support; "
            "expected null."
        )
    if config.get("use_sliding_window"):
        raise CheckpointError(
            "config.json: use_sliding_window is true, which the reference model does not support; expected false."
        )
    if config["hidden_act"] not in ACTIVATIONS:
        raise _bad("hidden_act", config["hidden_act"], " or ".join(ACTIVATIONS))


def _check_heads(config: GdaConfig) -> None:
    heads, noise, kv = config.num_attention_heads, config.num_noise_heads, config.num_key_value_heads
    if heads % noise or heads < 2 * noise:
        raise _bad("num_noise_heads", noise, f"a divisor of num_attention_heads ({heads}), at most half of it")
    if kv % 2 or noise % (kv // 2):
        raise _bad("num_key_value_heads", kv, f"twice a divisor of the number of query groups ({noise})")
    if config.head_dim % 2 or config.head_dim < 2:
        raise _bad("head_dim", config.head_dim, "an even number, because RoPE turns pairs")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """`rope_theta`, or the same under `rope_parameters`, where transformers 5 writes it."""
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise _bad("rope_parameters", parameters, "an object")
    if parameters.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json: rope_parameters asks for {parameters['rope_type']!r} RoPE, which the reference model does "
            "not support; expected rope_type 'default'."
        )
    return _positive("rope_theta", config.get("rope_theta", parameters.get("rope_theta")))


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(key, value, "a positive integer")
    return value


def _positive(key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _bad(key, value, "a positive number")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _bad(key, value, "true or false")
    return value


def _bad(key: str, got: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} is {got!r}, expected {expected}; correct the config.")
