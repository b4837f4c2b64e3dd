"""The model of a run as a module of `transformers`: from a directory, or with new weights from sizes."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, set_seed

import gdagrow.models.hf  # noqa: F401  (registers the Motif classes)


def build_model(
    config: Mapping[str, Any], names: Collection[str], weights: Path | None, seed: int, *, is_first: bool
) -> Any:
    """The model, a `PreTrainedModel`, in float32.

    Args:
        config: Of `config.json`.
        names: Of its parameters.
        weights: The directory of its safetensors; without one they are drawn.
        seed: Of weights that are drawn.
        is_first: Whether this is the first of several processes, which alone needs the weights: sharding spreads them.
    """
    made = AutoConfig.for_model(**{**config, "dtype": "float32"})
    made.use_cache = False
    if is_first and weights is not None:
        model = AutoModelForCausalLM.from_pretrained(weights, config=made, dtype=torch.float32)
        return model.float()  # what is stored wider stays so; sharding asks for one dtype in all processes
    # A config says of biases only what is usual; a checkpoint may have some.
    biases = sorted({name.split(".")[-2] for name in names if name.endswith("_proj.bias")})
    given: Any = {"dtype": torch.float32, **({"bias": biases} if made.model_type.lower() == "motif" else {})}
    if not is_first:
        return _empty(made, given)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(made, **given)


def _empty(config: PreTrainedConfig, given: Any) -> Any:
    """A model whose memory is set aside and never touched."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **given)
    if any(True for _ in model.buffers()):  # not among what is spread, so they must be right in every process
        return AutoModelForCausalLM.from_config(config, **given)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model
