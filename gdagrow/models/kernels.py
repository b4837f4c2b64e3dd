"""How queries read values: torch's fused attention, or maps that are written out.

Queries, keys and values are `[batch, positions, heads, width]`, the result is `[batch, heads, positions, width]`. A
head of keys and values serves as many query heads, one after the other, as there are for each of it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention in torch's fused kernels, whose memory does not grow with the square of the length.

    Args:
        queries, keys: of the width that the scores are scaled by.
        values: at least as wide as these.
        mask: broadcast to `[batch, heads, query positions, key positions]`, true (or 0) where a query may look and
            false (or a very negative number) where not. If None, queries are the last positions and look back.
    """
    width, past = queries.shape[-1], keys.shape[1] - queries.shape[1]
    # torch's own causal mask would let the first query see only the first key.
    if mask is None and past and queries.shape[1] > 1:
        mask = causal_mask(queries, keys)
    if mask is not None:
        # With a mask, the fast kernels of accelerators want a key for every query head, and fall back silently too.
        keys, values = _for_each(queries.shape[2], keys), _for_each(queries.shape[2], values)
    # Zeros leave the scores alone, and equal widths keep the fast kernel, which falls back silently otherwise.
    wider = (0, values.shape[-1] - width)
    return F.scaled_dot_product_attention(
        F.pad(queries, wider).transpose(1, 2),
        F.pad(keys, wider).transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and not past,
        scale=width**-0.5,
        enable_gqa=True,
    )


def written_out_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The same by attention maps that are kept in memory (transformers calls it eager)."""
    return read_by_maps(attention_maps(queries, keys, mask), values)


def attention_maps(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Where each query head looks, `[batch, query heads, query positions, key positions]` in at least float32."""
    dtype = at_least_float32(queries.dtype)
    keys = _for_each(queries.shape[2], keys)
    scores: Tensor = torch.einsum("bqhd,bkhd->bhqk", queries, keys).to(dtype) * queries.shape[-1] ** -0.5
    mask = causal_mask(queries, keys) if mask is None else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return (scores + mask.to(dtype)).softmax(dim=-1)


def read_by_maps(maps: Tensor, values: Tensor) -> Tensor:
    """What query heads read of the values by their maps."""
    values = _for_each(maps.shape[1], values)
    return torch.einsum("bhqk,bkhd->bhqd", maps.to(values.dtype), values)


def _for_each(num_heads: int, heads: Tensor) -> Tensor:
    """Keys or values once for each query head."""
    return heads.repeat_interleave(num_heads // heads.shape[2], dim=2)


def causal_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """True where the last positions may look, `[query positions, key positions]`."""
    shape = queries.shape[1], keys.shape[1]
    return queries.new_ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
