"""GDA models of the Motif layout as models of `transformers`, on the layers of `gdagrow.models.layers`."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from gdagrow.errors import CheckpointError
from gdagrow.models.hf_config import MotifConfig
from gdagrow.models.hf_layers import KERNELS, MapRecorder, MotifBlock
from gdagrow.models.hf_stored import stored_dtypes, without_layer
from gdagrow.models.kernels import at_least_float32
from gdagrow.models.layers import PROJECTIONS, Attending, GdaAttention, PolyNorm, Projection, RmsNorm


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
        if use_cache and past_key_values is None and not self.training:
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
        kernel = KERNELS[self.config._attn_implementation] if recorder is None else recorder.attend
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

    def _recorder(self, output_attentions: bool | None) -> "MapRecorder | None":
        if not (self.config.output_attentions if output_attentions is None else output_attentions):
            return None
        if self.config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} never writes attention maps out; load the "
                "model with attn_implementation='eager' to have output_attentions"
            )
        return MapRecorder()


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
        wide: parameters that are stored in a wider dtype than the embedding, and keep it in a narrower model: by the
            part of their name that is the same in every layer; likewise.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _loss_function = staticmethod(causal_lm_loss)

    def __init__(
        self,
        config: MotifConfig,
        bias: Collection[str] | None = None,
        wide: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:
        super().__init__(config)
        if bias is None:
            bias = PROJECTIONS if config.gda.use_bias else ()
        self.model = MotifModel(config, bias)
        self.vocab_size = config.gda.vocab_size
        self.lm_head = Projection(config.gda.hidden_size, config.gda.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            # Loading casts what is stored to the dtype that it finds here.
            dtype = wide.get(without_layer(name), parameter.dtype)
            parameter.data = parameter.data.to(torch.promote_types(dtype, parameter.dtype))
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

        Of a local directory, what is stored decides: biases exist where they are stored, `dtype="auto"`, the default,
        is the embedding's own dtype, and what is stored wider (such as float32 lambdas beside bf16 matrices) stays so.

        Raises:
            CheckpointError: tensors are missing or unknown, all of them named.
        """
        stored = stored_dtypes(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        if stored and not model_args:
            found = {name.split(".")[-2] for name in stored if name.endswith("_proj.bias")}
            main = stored.get("model.embed_tokens.weight", torch.float32)
            wide = {without_layer(name): dtype for name, dtype in stored.items() if dtype.itemsize > main.itemsize}
            # By position, since the generation config takes every keyword for its own.
            model_args = found & PROJECTIONS, wide
            if kwargs.get("dtype", kwargs.get("torch_dtype")) in ("auto", None):
                kwargs["dtype"] = main
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        _require_whole(pretrained_model_name_or_path, model, info)
        return (model, info) if output_loading_info else model


def _require_whole(path: Any, model: MotifForCausalLM, info: Mapping[str, Any]) -> None:
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is unexpected" for name in sorted(info["unexpected_keys"])]
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        problems.append("lm_head.weight is not the embedding, though tie_word_embeddings is true")
    if problems:
        raise CheckpointError(
            f"{path}: the weights are not those of config.json: {'; '.join(problems)}; restore the checkpoint"
        )
