"""GDA models of the Motif layout in `transformers`: importing this module registers them.

After `import gdagrow.models.hf`, `AutoModelForCausalLM.from_pretrained(directory)` loads any source or grown directory
without remote code. The layers are those of `gdagrow.models.layers`.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import can_return_tuple

from gdagrow.errors import CheckpointError
from gdagrow.models.config import GdaConfig
from gdagrow.models.hf_config import MotifConfig
from gdagrow.models.kernels import (
    Kernel,
    at_least_float32,
    attention_maps,
    fused_attention,
    read_by_maps,
    written_out_attention,
)
from gdagrow.models.layers import (
    PROJECTIONS,
    Attending,
    GdaAttention,
    GdaBlock,
    LayerCache,
    PolyNorm,
    Projection,
    RmsNorm,
)

__all__ = ["MotifConfig", "MotifForCausalLM", "MotifModel", "register"]

_KERNELS: Mapping[str, Kernel] = {"sdpa": fused_attention, "eager": written_out_attention}


class _CachedLayer(LayerCache):
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
            cache = _CachedLayer(past_key_values, self.layer_index, attending.mask is not None)
        return super().forward(hidden, cache, attending)


class MotifPreTrainedModel(PreTrainedModel):
    """What both classes below tell transformers of themselves."""

    config_class = MotifConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MotifBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As `gdagrow.models.gda.init_weights`, but for `initializer_range`, with torch's own random numbers."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RmsNorm):
            init.ones_(module.weight)
        elif isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, GdaAttention):
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(vector, std=0.1)


class MotifModel(MotifPreTrainedModel):
    """Embedding, blocks and final norm: what the checkpoint calls `model.`"""

    def __init__(self, config: MotifConfig, bias: Collection[str]) -> None:
        super().__init__(config)
        gda = config.gda
        self.embed_tokens = nn.Embedding(gda.vocab_size, gda.hidden_size)
        self.layers = nn.ModuleList(MotifBlock(gda, index, bias) for index in range(gda.num_hidden_layers))
        self.norm = RmsNorm(gda.hidden_size, gda.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks; arguments and outputs are those of any decoder of transformers.

        `attentions`, with `attn_implementation="eager"` alone, are each layer's softmax maps in the order of `q_proj`'s
        heads: the signal heads of a group, then its noise head, `[batch, query heads, positions, keys]`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        recorder = self._recorder(output_attentions)
        kernel = _KERNELS[self.config._attn_implementation] if recorder is None else recorder.attend
        states = []
        for layer in self.layers:
            states.append(hidden)
            hidden = layer(hidden, Attending(position_ids, mask, kernel), past_key_values=past_key_values)
        hidden = self.norm(hidden)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if wanted else None,
            attentions=None if recorder is None else recorder.layers(self.config.gda),
        )

    def _recorder(self, output_attentions: bool | None) -> "_Recorder | None":
        if not (self.config.output_attentions if output_attentions is None else output_attentions):
            return None
        if self.config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} never writes attention maps out; load the "
                "model with attn_implementation='eager' to have output_attentions"
            )
        return _Recorder()


class _Recorder:
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


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss that transformers gives a causal model, but in float64 where logits are.

    Args:
        logits: `[batch, positions, vocab]`.
        labels: `[batch, positions]`, shifted here.
        vocab_size: of the logits.
        num_items_in_batch: what the sum of all labels' losses is divided by, their number if None.
        ignore_index: the label that counts for nothing.
        shift_labels: labels that are shifted already.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    scores = logits.to(at_least_float32(logits.dtype)).view(-1, vocab_size)
    targets = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(scores, targets, ignore_index=ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return F.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


class MotifForCausalLM(MotifPreTrainedModel, GenerationMixin):
    """A causal GDA language model with the parameter names of a Motif checkpoint.

    Args:
        config: as read from `config.json`.
        bias: which of the seven projections (`q_proj` ... `down_proj`) have a bias; by default all or none, as
            `use_bias` of the config says. `from_pretrained` finds out by itself.
        float32: the ends of the names of parameters that stay in float32 when the model is loaded in a lower
            precision; likewise.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _loss_function = staticmethod(causal_lm_loss)

    def __init__(self, config: MotifConfig, bias: Collection[str] | None = None, float32: Collection[str] = ()) -> None:
        super().__init__(config)
        if bias is None:
            bias = PROJECTIONS if config.gda.use_bias else ()
        self.model = MotifModel(config, bias)
        self.vocab_size = config.gda.vocab_size
        self.lm_head = Projection(config.gda.hidden_size, config.gda.vocab_size, bias=False)
        self._keep_in_fp32_modules_strict = set(float32)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits in the activations' dtype, and the loss of `labels`, shifted here (-100 is left out).

        `logits_to_keep` is the number of last positions to compute logits of (0 for all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, but whole or not at all.

        Of a local directory, what is stored decides: biases exist where they are stored, float32 tensors beside bf16
        ones (such as lambdas) stay float32 in bf16, and `dtype="auto"`, the default, is the embedding's own.

        Raises:
            CheckpointError: tensors are missing or unknown, all of them named.
        """
        stored = _stored_dtypes(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        if stored:
            found = {name.split(".")[-2] for name in stored if name.endswith("_proj.bias")}
            kwargs.setdefault("bias", sorted(found & PROJECTIONS))
            main = stored.get("model.embed_tokens.weight", "F32")
            if main in ("BF16", "F16"):
                kept = {_without_layer(name) for name, dtype in stored.items() if dtype == "F32"}
                kwargs.setdefault("float32", sorted(kept))
            if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in ("auto", None) and main in _TORCH_DTYPES:
                kwargs.pop("torch_dtype", None)
                kwargs["dtype"] = _TORCH_DTYPES[main]
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        _require_whole(pretrained_model_name_or_path, model, info)
        return (model, info) if output_loading_info else model


_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _stored_dtypes(name_or_path: Any, subfolder: str) -> dict[str, str]:
    """The safetensors dtype code of every tensor of a local directory; empty for all else."""
    if name_or_path is None:
        return {}
    directory = Path(name_or_path, subfolder)
    index = directory / "model.safetensors.index.json"
    files = {directory / "model.safetensors"}
    if not directory.joinpath("model.safetensors").is_file() and index.is_file():
        files = {directory / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    found: dict[str, str] = {}
    for path in files:
        if path.is_file():
            with safe_open(path, "pt") as file:
                found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def _without_layer(name: str) -> str:
    """The end of a layer's parameter name that is the same in every layer."""
    return name.split(".", 3)[-1] if name.startswith("model.layers.") else name


def _require_whole(path: Any, model: MotifForCausalLM, info: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is unexpected" for name in sorted(info["unexpected_keys"])]
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        problems.append("lm_head.weight is not the embedding, though tie_word_embeddings is true")
    if problems:
        raise CheckpointError(
            f"{path}: the weights are not those of config.json: {'; '.join(problems)}; restore the checkpoint"
        )


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the layout, under both spellings of its `model_type`."""
    AutoConfig.register("motif", MotifConfig, exist_ok=True)
    # `AutoConfig.register` wants one class for each spelling.
    CONFIG_MAPPING.register("Motif", MotifConfig, exist_ok=True)
    AutoModelForCausalLM.register(MotifConfig, MotifForCausalLM, exist_ok=True)


register()
