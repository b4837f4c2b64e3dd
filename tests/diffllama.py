"""The DiffLlama models of `transformers`, which nobody here wrote, to and from Motif's layout at the ratio 1:1."""

from math import exp
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gdagrow.lambda_init import lambda_init

TOPOLOGIES = [
    # hidden, ffn, layers, heads, kv heads, head_dim, tied
    (32, 48, 1, 4, 4, 8, False),
    (32, 40, 2, 8, 4, 4, True),
    (20, 24, 3, 12, 2, 6, False),
    (48, 16, 3, 12, 6, 4, True),
    (16, 56, 2, 16, 4, 10, False),
]


# What a logit of `transformers` may err by, relative to the largest: float64, except where it goes down to float32,
# which are norms, RoPE tables and lambda. That is four roundings in each of three layers (two norms, the rotation of
# queries and keys, lambda) and one at the end, each of at most eps / 2; the difference of two attentions can be a third
# of either, and the sub-norm scales it up again, error included: 13 * 3 * eps / 2, about 20 eps = 2.4e-6.
FLOOR = 20 * torch.finfo(torch.float32).eps


def diffllama(sizes: tuple[int, int, int, int, int, int, bool], seed: int, *, bias: bool = False) -> Any:
    """A random float64 DiffLlama with every parameter away from its initial value."""
    hidden, ffn, layers, heads, kv_heads, head_dim, tied = sizes
    config = transformers.DiffLlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=40, tie_word_embeddings=tied, rms_norm_eps=1e-4,
        attention_dropout=0.0, attn_implementation="sdpa", pad_token_id=None, attention_bias=bias,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.DiffLlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * deviation)
    return model


def floor_of(model: Any, condition: float) -> float:
    """`FLOOR` for a random model: 8 times its measured condition (see `gdagrow.verify.logits`) in float32 roundings.

    Its norms and RoPE tables err by at most eps each, and the condition says how much of that reaches a logit. It does
    not know lambda, whose error is one of the difference of two attentions: of `|1 - lambda|` where both are alike.
    """
    left = 1.0
    for layer in model.model.layers:
        own = layer.self_attn
        weight = (own.lambda_q1 @ own.lambda_k1).exp() - (own.lambda_q2 @ own.lambda_k2).exp() + own.lambda_init
        left = min(left, abs(1 - weight.item()))
    return 8 * condition / left * torch.finfo(torch.float32).eps


def save_diffllama(
    directory: Path, sizes: tuple[int, int, int, int, int, int, bool], *, dtype: torch.dtype, bias: bool = False,
    seed: int = 1,
) -> None:  # fmt: skip
    """Write such a model as `transformers` saves it."""
    diffllama(sizes, seed, bias=bias).to(dtype).save_pretrained(directory)


def load_diffllama(directory: Path) -> Any:
    """Load a directory in `transformers` alone, in float64; nothing may be missing or left over."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(told.values()), told
    assert type(model) is transformers.DiffLlamaForCausalLM
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    return model.eval()


def motif_config(config: Any) -> dict[str, Any]:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "rms_norm_eps", "hidden_act", "tie_word_embeddings")  # fmt: skip
    copied = {key: getattr(config, key) for key in keys}
    return {**copied, "rope_theta": config.rope_parameters["rope_theta"], "attn_rms_norm_eps": config.rms_norm_eps}


def interleave_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Head `i` and head `i + num_heads / 2` become heads `2i` and `2i + 1`: signal with noise, or two value halves."""
    return weight.view(2, -1, head_dim, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def as_motif(model: Any) -> dict[str, Tensor]:
    """The state dict in Motif's layout. DiffLlama starts counting lambda_init one layer later; its sub-norm is bare."""
    source = model.state_dict()
    result = {name: tensor.clone() for name, tensor in source.items() if name != "lm_head.weight"}
    if not model.config.tie_word_embeddings:
        result["lm_head.weight"] = source["lm_head.weight"]
    head_dim = model.config.head_dim
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for name in ("q_proj", "k_proj", "v_proj"):
            result[f"{prefix}{name}.weight"] = interleave_halves(source[f"{prefix}{name}.weight"], head_dim)
        theirs, ours = 0.8 - 0.6 * exp(-0.3 * layer), lambda_init(layer)
        query, key = source[f"{prefix}lambda_q1"], source[f"{prefix}lambda_k1"]
        wanted = torch.log((query @ key).exp() + theirs - ours)
        result[f"{prefix}lambda_q1"] = query + (wanted - query @ key) * key / (key @ key)
        result[f"{prefix}subln.weight"] = torch.full((2 * head_dim,), (1 - theirs) / (1 - ours), dtype=torch.float64)
    return result


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave_halves`."""
    return weight.view(-1, 2, head_dim, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def as_diffllama(tensors: dict[str, Tensor], config: dict[str, Any], original: Any) -> Any:
    """A DiffLlama from tensors grown from `as_motif(original)`, whose lambdas and sub-norms they must still have."""
    grown = transformers.DiffLlamaConfig(**{**original.config.to_dict(), **{
        key: config[key] for key in
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    }})  # fmt: skip
    model = transformers.DiffLlamaForCausalLM(grown).double().eval()
    source, motif = original.state_dict(), as_motif(original)
    state = dict(tensors)
    for name, tensor in tensors.items():
        if ".lambda_" in name or ".subln." in name:
            assert torch.equal(tensor, motif[name]), name
        if ".lambda_" in name:
            state[name] = source[name]
        elif ".subln." in name:
            del state[name]
        elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            state[name] = split_halves(tensor, grown.head_dim)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if grown.tie_word_embeddings else set()), missing
    assert not unexpected
    return model
