"""A GDA language model written a second time, as loops over heads and full score matrices in float64.

It shares no code with `gdagrow.models` and follows the formulas of the layout and of arXiv:2510.06949 one by one, so
that a mistake would have to be made twice to pass unseen. Gradients flow through it. It is slow, for tests only.
"""

from collections.abc import Mapping
from math import exp, sqrt
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def reference_logits(tensors: Tensors, config: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    """Float64 logits `[batch, position, vocab]` of a Motif state dict and `config.json` on ids `[batch, position]`."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    rows = []
    for ids in input_ids:
        hidden = embedding[ids]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            block = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            hidden = _block(hidden, block, config, layer)
        rows.append(_rms(hidden, config["rms_norm_eps"]) * tensors["model.norm.weight"] @ head.T)
    return torch.stack(rows)


def _block(hidden: Tensor, block: Tensors, config: Mapping[str, Any], layer: int) -> Tensor:
    eps = config["rms_norm_eps"]
    hidden = hidden + _attention(_rms(hidden, eps) * block["input_layernorm.weight"], block, config, layer)
    return hidden + _mlp(_rms(hidden, eps) * block["post_attention_layernorm.weight"], block, config)


def _attention(hidden: Tensor, block: Tensors, config: Mapping[str, Any], layer: int) -> Tensor:
    heads = config["num_attention_heads"]
    dim = config.get("head_dim", config["hidden_size"] // heads)
    groups = config.get("num_noise_heads", heads // 2)
    ratio = heads // groups - 1
    groups_per_kv = groups // (config["num_key_value_heads"] // 2)
    init = 0.8 - 0.6 * exp(-0.3 * (layer - 1))
    lambdas = {name: block[f"self_attn.lambda_{name}"] for name in ("q1", "k1", "q2", "k2")}
    weight = (lambdas["q1"] @ lambdas["k1"]).exp() - (lambdas["q2"] @ lambdas["k2"]).exp() + init

    query, key, value = (_linear(hidden, block, f"self_attn.{name}_proj") for name in "qkv")
    outputs = []
    for group in range(groups):
        kv = group // groups_per_kv
        both_halves = torch.cat((_head(value, 2 * kv, dim), _head(value, 2 * kv + 1, dim)), dim=1)
        noise_query = _head(query, group * (ratio + 1) + ratio, dim)
        noise_map = _map(noise_query, _head(key, 2 * kv + 1, dim), config["rope_theta"])
        for signal in range(ratio):
            signal_query = _head(query, group * (ratio + 1) + signal, dim)
            signal_map = _map(signal_query, _head(key, 2 * kv, dim), config["rope_theta"])
            output = signal_map @ both_halves - weight * (noise_map @ both_halves)
            output = _rms(output, config["attn_rms_norm_eps"]) * block["self_attn.subln.weight"]
            outputs.append(output * (1 - init))
    return _linear(torch.cat(outputs, dim=1), block, "self_attn.o_proj")


def _head(features: Tensor, index: int, dim: int) -> Tensor:
    return features[:, index * dim : (index + 1) * dim]


def _map(query: Tensor, key: Tensor, theta: float) -> Tensor:
    """Causal softmax of the scaled scores, one row after the other."""
    positions, dim = query.shape
    query, key = _rope(query, theta), _rope(key, theta)
    result = torch.zeros(positions, positions, dtype=torch.float64)
    for position in range(positions):
        scores = key[: position + 1] @ query[position] / sqrt(dim)
        result[position, : position + 1] = torch.softmax(scores, dim=0)
    return result


def _rope(head: Tensor, theta: float) -> Tensor:
    positions, dim = head.shape
    half = dim // 2
    result = torch.empty_like(head)
    for index in range(half):
        angle = torch.arange(positions, dtype=torch.float64) * theta ** (-2 * index / dim)
        first, second = head[:, index], head[:, index + half]
        result[:, index] = first * angle.cos() - second * angle.sin()
        result[:, index + half] = second * angle.cos() + first * angle.sin()
    return result


def _mlp(hidden: Tensor, block: Tensors, config: Mapping[str, Any]) -> Tensor:
    gate = _linear(hidden, block, "mlp.gate_proj")
    if config["hidden_act"] == "poly_norm":
        weight, bias = block["mlp.act_fn.weight"], block["mlp.act_fn.bias"]
        gate = sum(weight[i] * _rms(gate**power, 1e-6) for i, power in enumerate((3, 2, 1))) + bias
    else:
        gate = gate / (1 + torch.exp(-gate))
    return _linear(gate * _linear(hidden, block, "mlp.up_proj"), block, "mlp.down_proj")


def _linear(features: Tensor, block: Tensors, name: str) -> Tensor:
    result = features @ block[f"{name}.weight"].T
    return result + block[f"{name}.bias"] if f"{name}.bias" in block else result


def _rms(features: Tensor, eps: float) -> Tensor:
    return features / torch.sqrt((features * features).mean(dim=-1, keepdim=True) + eps)
