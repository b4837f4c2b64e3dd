"""The attention maps of a state of a run in a few figures a layer, of differential and of standard attention alike."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor

from gdagrow.archs import trained_of
from gdagrow.archs.llama import Llama
from gdagrow.checkpoint import read_checkpoint
from gdagrow.costs import checkpoint_figures
from gdagrow.errors import CompareError
from gdagrow.header import Header
from gdagrow.verify.attention import LayerStats, MapStats, attention_stats, causal_map_stats

_FIGURES: Final = ("entropy", "top_5_percent")


def measure_maps(state: Path, tokens: Tensor) -> tuple[dict[str, float], ...]:
    """Measure the maps of a model on some tokens, in float32; see `gdagrow.verify.attention.MapStats`.

    Args:
        state: A checkpoint directory of a run.
        tokens: int64 `[sequences, length]`.

    Returns:
        For each layer means over heads, sequences and query positions: `entropy` (nats) and `top_5_percent` (share)
        of `signal`, `noise` and `difference` maps, as `signal_entropy` and so on, `difference_negative` (share), and
        the layer's `lambda`. Standard attention has no `noise`: what it applies is its signal maps, less 0 times that.

    Raises:
        CheckpointError: the state cannot be read or run.
        CompareError: the maps are not finite.
    """
    header = read_checkpoint(state)
    if isinstance(trained_of(header.config), Llama):
        return tuple(_standard_layers(header, tokens))
    return tuple(_differential_layer(layer) for layer in attention_stats(state, tokens).layers)


def _differential_layer(layer: LayerStats) -> dict[str, float]:
    maps = {"signal": layer.signal, "noise": layer.noise, "difference": layer.difference}
    return {**_told(maps), "lambda": layer.lambda_}


def _told(maps: Mapping[str, MapStats]) -> dict[str, float]:
    told = {f"{kind}_{figure}": fmean(getattr(stats, figure)) for kind, stats in maps.items() for figure in _FIGURES}
    return told | {"difference_negative": fmean(maps["difference"].negative or ())}


def _standard_layers(header: Header, tokens: Tensor) -> Iterator[dict[str, float]]:
    """The maps that transformers' own model makes, of one layer and sequence at a time."""
    from transformers.utils import logging

    from gdagrow.train.building import build_model

    logging.disable_progress_bar()  # of loading
    checkpoint_figures(header)  # refuses tensors that are missing or misshapen
    model = build_model(header.config, header.tensors, header.directory, 0, is_first=True).eval()
    model.set_attn_implementation("eager")
    seen: list[list[dict[str, float]]] = [[] for _ in model.model.layers]
    for layer, found in zip(model.model.layers, seen, strict=True):
        layer.self_attn.register_forward_hook(_looking(header.directory, found))
    with torch.no_grad():
        for sequence in tokens:
            model.model(input_ids=sequence[None])
    for of_layer in seen:
        yield {**{key: fmean(of_one[key] for of_one in of_layer) for key in of_layer[0]}, "lambda": 0.0}


def _looking(directory: Path, found: list[dict[str, float]]) -> Callable[..., None]:
    """A forward hook that measures the maps of one sequence, which the module returns beside its output."""

    def look(module: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        stats = causal_map_stats(outputs[1][0])
        if stats is None:
            raise CompareError(f"{directory}: attention maps are not finite, so there is nothing to measure; look for "
                               "weights that are not finite")  # fmt: skip
        found.append(_told({"signal": stats, "difference": stats}))

    return look
