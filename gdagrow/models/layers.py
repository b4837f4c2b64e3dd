"""The layers of a GDA model, one module each, with the parameter names of a Motif checkpoint.

Every module computes its sensitive parts (norms, RoPE, lambda, the difference of the two attentions) in at least
float32, stays in float64 when fed float64, and returns the dtype of its input. Weights stored in another dtype
than the activations, such as float32 lambdas beside bf16 matrices, are cast where they are used.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdagrow.lambda_init import lambda_init
from gdagrow.models.config import GdaConfig
from gdagrow.models.kernels import Kernel, at_least_float32, fused_attention

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = frozenset(ATTENTION_PROJECTIONS + MLP_PROJECTIONS)
POLY_NORM_EPS = 1e-6


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, each `[..., positions, 1, head_dim / 2]`, at integer positions `[..., positions]`.

    Angles are made in float64, since a float32 angle at position 30000 is off by 1e-3, and made anew at every call: a
    non-persistent buffer would be garbage after a meta-device load.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None, None] * theta**-exponents
    dtype = at_least_float32(dtype)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in half-split order (dim `i` turns with `i + head_dim / 2`) on `[..., positions, heads, head_dim]`."""
    first, second = heads.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(heads.dtype)


class Projection(nn.Linear):
    """A linear layer that casts its weight to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class RmsNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, `weight` `[size]`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """The norm, `factor` times: of the weight, which is smaller than `x`."""
        dtype = at_least_float32(x.dtype)
        weight = self.weight.to(dtype) * factor
        return F.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(x.dtype)


class PolyNorm(nn.Module):
    """`w0*n(x^3) + w1*n(x^2) + w2*n(x) + b` with `n(z) = z / sqrt(mean(z^2) + 1e-6)` over the last dim.

    `weight` is `[3]`, `bias` `[1]`. Source: arXiv:2411.03884.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        dtype = at_least_float32(x.dtype)
        z = x.to(dtype)
        square = z * z
        fourth = square * square
        cubic, quadratic, linear = (
            weight * (squared_power.mean(-1, keepdim=True) + POLY_NORM_EPS).rsqrt()
            for weight, squared_power in zip(self.weight.to(dtype), (fourth * square, fourth, square), strict=True)
        )
        # Horner's scheme, each step in one pass, as passes over the model's widest activation show: forward, it takes
        # two thirds of the time of three norms.
        scheme = torch.addcmul(quadratic, cubic, z)
        scheme = torch.addcmul(linear, scheme, z)
        return torch.addcmul(self.bias.to(dtype), scheme, z).to(x.dtype)


class Projected(NamedTuple):
    """One layer's queries, keys and values, RoPE applied, `[batch, positions, heads, width]` each.

    There are `N * r` signal and `N` noise queries, and `C` signal keys, noise keys and values (of width `2 head_dim`).
    """

    signal: Tensor
    noise: Tensor
    signal_keys: Tensor
    noise_keys: Tensor
    values: Tensor


class LayerCache:
    """The keys and values of one layer's earlier positions, to decode token by token."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions that are cached."""
        return 0 if self._keys is None else self._keys.shape[1]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions, `[batch, positions, heads, width]`; returns all there are."""
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat((self._keys, keys), 1), torch.cat((self._values, values), 1)
        self._keys, self._values = keys, values
        return keys, values


class Attending(NamedTuple):
    """How the queries of one call look at keys.

    positions: Where the tokens stand, integers `[batch or 1, positions]`; after those in the cache if None.
    mask: What they may look at (see `gdagrow.models.kernels`); what stands before them if None.
    kernel: How values are read.
    """

    positions: Tensor | None = None
    mask: Tensor | None = None
    kernel: Kernel = fused_attention


CAUSAL = Attending()


class GdaAttention(nn.Module):
    """Grouped differential attention of one layer (arXiv:2510.06949), causal, over `[batch, positions, hidden]`.

    In each of `N` groups one noise map is made, scaled by lambda and subtracted from the group's `r` signal maps.
    q_proj rows are `(group, r signal heads + 1 noise head, head_dim)`, k_proj rows `(kv group, signal | noise,
    head_dim)`, v_proj rows `(kv group, 2 head_dim)`, o_proj columns `(group, signal head, 2 head_dim)`.
    """

    def __init__(self, config: GdaConfig, layer_index: int, bias: Collection[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.lambda_init = lambda_init(layer_index)
        hidden, head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * head_dim
        self.q_proj = Projection(hidden, config.num_attention_heads * head_dim, "q_proj" in bias)
        self.k_proj = Projection(hidden, kv_width, "k_proj" in bias)
        self.v_proj = Projection(hidden, kv_width, "v_proj" in bias)
        self.o_proj = Projection(config.num_signal_heads * 2 * head_dim, hidden, "o_proj" in bias)
        self.lambda_q1 = nn.Parameter(torch.zeros(head_dim))
        self.lambda_k1 = nn.Parameter(torch.zeros(head_dim))
        self.lambda_q2 = nn.Parameter(torch.zeros(head_dim))
        self.lambda_k2 = nn.Parameter(torch.zeros(head_dim))
        self.subln = RmsNorm(2 * head_dim, config.attn_rms_norm_eps)

    def forward(self, hidden: Tensor, cache: LayerCache | None = None, attending: Attending = CAUSAL) -> Tensor:
        projected = self.project(hidden, cache, attending.positions)
        output: Tensor = self.o_proj(self.difference(*self.attend(projected, attending)))
        return output

    def project(self, hidden: Tensor, cache: LayerCache | None = None, positions: Tensor | None = None) -> Projected:
        """Queries of `hidden`'s positions; keys and values of these and, before them, of those in the cache."""
        config = self.config
        lead, head_dim = hidden.shape[:2], config.head_dim
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + lead[1], device=hidden.device)
        cos, sin = rotary_table(positions, head_dim, config.rope_theta, hidden.dtype)
        queries = rotate(self.q_proj(hidden).view(*lead, -1, head_dim), cos, sin)
        queries = queries.view(*lead, config.num_groups, config.ratio + 1, head_dim)
        keys = rotate(self.k_proj(hidden).view(*lead, -1, head_dim), cos, sin)
        values = self.v_proj(hidden).view(*lead, config.num_kv_groups, 2 * head_dim)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return Projected(
            queries[..., :-1, :].flatten(2, 3), queries[..., -1, :], keys[..., 0::2, :], keys[..., 1::2, :], values
        )

    def attend(self, projected: Projected, attending: Attending = CAUSAL) -> tuple[Tensor, Tensor]:
        """What signal heads and noise heads read, `[batch, heads, positions, 2 head_dim]` each."""
        read, values, mask = attending.kernel, projected.values, attending.mask
        signal = read(projected.signal, projected.signal_keys, values, mask)
        return signal, read(projected.noise, projected.noise_keys, values, mask)

    def difference(self, signal: Tensor, noise: Tensor) -> Tensor:
        """What `o_proj` reads, `[batch, positions, signal heads * 2 head_dim]`: the normed difference of each head."""
        dtype = at_least_float32(signal.dtype)
        # Heads after positions, as torch's attention lays its result out and o_proj reads: nothing is copied between.
        signal, noise = signal.transpose(1, 2), noise.transpose(1, 2)
        grouped = signal.to(dtype).view(*signal.shape[:2], self.config.num_groups, self.config.ratio, -1)
        difference = torch.addcmul(grouped, noise.to(dtype).unsqueeze(3), self.current_lambda(dtype), value=-1)
        heads: Tensor = self.subln(difference, 1 - self.lambda_init).to(signal.dtype)
        return heads.flatten(2)

    def current_lambda(self, dtype: torch.dtype) -> Tensor:
        """`exp(q1 . k1) - exp(q2 . k2) + lambda_init`, a scalar of `dtype`."""
        first = (self.lambda_q1.to(dtype) * self.lambda_k1.to(dtype)).sum().exp()
        second = (self.lambda_q2.to(dtype) * self.lambda_k2.to(dtype)).sum().exp()
        return first - second + self.lambda_init


class GdaMlp(nn.Module):
    """`down(act(gate(x)) * up(x))` with `act` PolyNorm or SiLU, over `[..., hidden]`."""

    def __init__(self, config: GdaConfig, bias: Collection[str] = ()) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = Projection(hidden, ffn, "gate_proj" in bias)
        self.up_proj = Projection(hidden, ffn, "up_proj" in bias)
        self.down_proj = Projection(ffn, hidden, "down_proj" in bias)
        self.act_fn = PolyNorm() if config.hidden_act == "poly_norm" else nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class GdaBlock(nn.Module):
    """One pre-norm residual layer over `[batch, positions, hidden]`, usable alone.

    Its parameters have the checkpoint's names without the prefix `model.layers.{layer_index}.`; `layer_index` matters
    besides, because lambda_init depends on it. `bias` names the projections that have one.
    """

    def __init__(self, config: GdaConfig, layer_index: int, bias: Collection[str] = ()) -> None:
        super().__init__()
        self.self_attn = GdaAttention(config, layer_index, bias)
        self.mlp = GdaMlp(config, bias)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, cache: LayerCache | None = None, attending: Attending = CAUSAL) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cache, attending)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output
