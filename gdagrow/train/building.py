"""The model of a run as a module of `transformers`: from a directory, or with new weights from sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

import gdagrow.models.hf  # noqa: F401  (registers the Motif classes)
from gdagrow.archs import architecture_of
from gdagrow.costs import checkpoint_figures
from gdagrow.errors import TrainError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.strict_json import parse_object
from gdagrow.train.recipe import ModelSource
from gdagrow.train.sharded import is_sharded


def config_of(source: ModelSource) -> dict[str, Any]:
    """The `config.json` of the model that a run starts from.

    Raises:
        CheckpointError: the directory is no checkpoint, or the config makes no sense or has no table.
        TrainError: the checkpoint is in parts of several processes.
    """
    if source.config is not None:
        config = {"model_type": "motif", **source.config}
        architecture_of(config).sizes(config)
        return config
    assert source.directory is not None
    if is_sharded(source.directory):
        raise TrainError(
            f"{source.directory} holds the weights of several processes, each its part; make a model directory of it "
            "first with gdagrow convert"
        )
    header = read_header(source.directory)
    checkpoint_figures(header)  # refuses tensors that are missing or misshapen
    return dict(header.config)


def config_in(state: Path) -> dict[str, Any]:
    """The `config.json` of a state of a run."""
    path = state / "config.json"
    return parse_object(path.read_bytes(), str(path))


def build_model(config: Mapping[str, Any], weights: Path | None, seed: int, *, is_first: bool) -> PreTrainedModel:
    """The model in float32.

    Args:
        config: Of `config.json`.
        weights: The directory of its safetensors; without one they are drawn.
        seed: Of weights that are drawn.
        is_first: Whether this is the first of several processes, which alone needs the weights: sharding spreads them.
    """
    made = AutoConfig.for_model(**{**config, "dtype": "float32"})
    made.use_cache = False
    if not is_first:
        return _empty(made)
    if weights is not None:
        return AutoModelForCausalLM.from_pretrained(weights, config=made, dtype=torch.float32)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32)


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose memory is set aside and never touched."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if any(True for _ in model.buffers()):  # not among what is spread, so they must be right on every process
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model
