"""A GDA language model written a second time, as loops over heads and full score matrices in float64.

It shares no code with `gdagrow.models` and follows the formulas of the layout and of arXiv:2510.06949 one by one, so
that a mistake would have to be made twice to pass unseen. Gradients flow through it. It is slow, for tests only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
            hidden = _block(hidden, _of_layer(tensors, layer), config, layer)
        rows.append(_rms(hidden, config["rms_norm_eps"]) * tensors["model.norm.weight"] @ head.T)
    return torch.stack(rows)


@dataclass(frozen=True)
class LayerMaps:
    """A layer's attention on one sequence, float64: signal maps group-major and noise maps `[position, position]`."""

    signal: list[Tensor]
    noise: list[Tensor]
    lambda_: float


def reference_maps(tensors: Tensors, config: Mapping[str, Any], ids: Tensor) -> list[LayerMaps]:
    """The attention maps of every layer on the ids `[position]` of one sequence."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    hidden, found = tensors["model.embed_tokens.weight"][ids], []
    for layer in range(config["num_hidden_layers"]):
        block = _of_layer(tensors, layer)
        normed = _rms(hidden, config["rms_norm_eps"]) * block["input_layernorm.weight"]
        found.append(LayerMaps(*_attention_maps(normed, block, config), float(_lambda(block, layer))))
        hidden = _block(hidden, block, config, layer)
    return found


def _of_layer(tensors: Tensors, layer: int) -> Tensors:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _block(hidden: Tensor, block: Tensors, config: Mapping[str, Any], layer: int) -> Tensor:
    eps = config["rms_norm_eps"]
    hidden = hidden + _attention(_rms(hidden, eps) * block["input_layernorm.weight"], block, config, layer)
    return hidden + _mlp(_rms(hidden, eps) * block["post_attention_layernorm.weight"], block, config)


def _attention(hidden: Tensor, block: Tensors, config: Mapping[str, Any], layer: int) -> Tensor:
    _, dim, groups, ratio, groups_per_kv = _heads(config)
    init, weight = _lambda_init(layer), _lambda(block, layer)
    value = _linear(hidden, block, "self_attn.v_proj")
    signal_maps, noise_maps = _attention_maps(hidden, block, config)
    outputs = []
    for group in range(groups):
        kv = group // groups_per_kv
        both_halves = torch.cat((_head(value, 2 * kv, dim), _head(value, 2 * kv + 1, dim)), dim=1)
        for signal in range(ratio):
            signal_map = signal_maps[group * ratio + signal]
            output = signal_map @ both_halves - weight * (noise_maps[group] @ both_halves)
            output = _rms(output, config["attn_rms_norm_eps"]) * block["self_attn.subln.weight"]
            outputs.append(output * (1 - init))
    return _linear(torch.cat(outputs, dim=1), block, "self_attn.o_proj")


def _attention_maps(hidden: Tensor, block: Tensors, config: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Every signal head's map, group-major, and every group's noise map, `[position, position]` each."""
    _, dim, groups, ratio, groups_per_kv = _heads(config)
    query, key = (_linear(hidden, block, f"self_attn.{name}_proj") for name in "qk")
    signals, noises = [], []
    for group in range(groups):
        kv = group // groups_per_kv
        noise_query = _head(query, group * (ratio + 1) + ratio, dim)
        noises.append(_map(noise_query, _head(key, 2 * kv + 1, dim), config["rope_theta"]))
        for signal in range(ratio):
            signal_query = _head(query, group * (ratio + 1) + signal, dim)
            signals.append(_map(signal_query, _head(key, 2 * kv, dim), config["rope_theta"]))
    return signals, noises


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Query heads, head_dim, groups, signal heads to a group, and groups to a KV group."""
    heads = config["num_attention_heads"]
    groups = config.get("num_noise_heads", heads // 2)
    dim = config.get("head_dim", config["hidden_size"] // heads)
    return heads, dim, groups, heads // groups - 1, groups // (config["num_key_value_heads"] // 2)


def _lambda_init(layer: int) -> float:
    return 0.8 - 0.6 * exp(-0.3 * (layer - 1))


def _lambda(block: Tensors, layer: int) -> Tensor:
    q1, k1, q2, k2 = (block[f"self_attn.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
    return (q1 @ k1).exp() - (q2 @ k2).exp() + _lambda_init(layer)


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
