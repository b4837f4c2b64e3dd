"""What a layer needs to run in `transformers`: its cache, its choice of kernels, its checkpointing."""

from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from gdagrow.models.config import GdaConfig
from gdagrow.models.kernels import Kernel, attention_maps, fused_attention, read_by_maps, written_out_attention
from gdagrow.models.layers import Attending, GdaBlock, LayerCache

# By `attn_implementation`.
KERNELS: Final[Mapping[str, Kernel]] = {"sdpa": fused_attention, "eager": written_out_attention}


class CachedLayer(LayerCache):
    """One layer of a cache of transformers, which keeps `[batch, heads, positions, head_dim]`.

    Values are kept as the `num_key_value_heads` heads that a usual model has, so that every cache finds the shapes that
    it expects. What a cache of fixed length has in reserve is cut off where no mask hides it.
    """

    def __init__(self, cache: Cache, layer_index: int, has_mask: bool) -> None:
        self._cache, self._layer_index, self._has_mask = cache, layer_index, has_mask

    @property
    def length(self) -> int:
        return int(self._cache.get_seq_length(self._layer_index))

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        as_heads = values.reshape(keys.shape)
        found = self._cache.update(keys.transpose(1, 2), as_heads.transpose(1, 2), self._layer_index)
        all_keys, all_values = (states.transpose(1, 2) for states in found)
        if not self._has_mask and keys.shape[1] > 1:
            all_keys, all_values = all_keys[:, : keys.shape[1]], all_values[:, : keys.shape[1]]
        return all_keys, all_values.reshape(*all_values.shape[:2], *values.shape[2:])


class MapRecorder:
    """Keeps the maps by which values were read: a layer's signal maps, then its noise maps."""

    def __init__(self) -> None:
        self._maps: list[Tensor] = []

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        maps = attention_maps(queries, keys, mask)
        self._maps.append(maps)
        return read_by_maps(maps, values)

    def layers(self, config: GdaConfig) -> tuple[Tensor, ...]:
        """The maps of every layer, in the order of its query heads."""
        both = zip(self._maps[0::2], self._maps[1::2], strict=True)
        return tuple(
            torch.cat([maps.view(len(maps), config.num_groups, -1, *maps.shape[2:]) for maps in layer], 2).flatten(1, 2)
            for layer in both
        )


class MotifBlock(GdaBlock, GradientCheckpointingLayer):
    """A layer whose activations may be computed anew for the backward pass."""

    def __init__(self, config: GdaConfig, layer_index: int, bias: Collection[str]) -> None:
        super().__init__(config, layer_index, bias)
        self.layer_index = layer_index

    def forward(  # type: ignore[override]
        self, hidden: Tensor, attending: Attending, past_key_values: Cache | None = None
    ) -> Tensor:
        cache = None
        if past_key_values is not None:
            cache = CachedLayer(past_key_values, self.layer_index, attending.mask is not None)
        return super().forward(hidden, cache, attending)
