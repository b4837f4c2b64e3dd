"""Greedy decoding by two models through their caches of keys and values, one half of a layer in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdagrow.models.layers import LayerCache
from gdagrow.verify.forward import HEAD_ELEMENTS, StreamedModel


@dataclass(frozen=True)
class Decoding:
    """What two models wrote after the same prompt.

    prompt_length: Tokens of the prompt.
    source, grown: The tokens, up to the first where they differ by more than rounding.
    same: Whether they do not differ.
    """

    prompt_length: int
    source: tuple[int, ...]
    grown: tuple[int, ...]
    same: bool


def decode(
    source: StreamedModel, grown: StreamedModel, prompt: Tensor, num_tokens: int, *, tolerance: float,
    progress: Callable[[str], None],
) -> Decoding:  # fmt: skip
    """Let both models go on from a prompt, each token the most likely one.

    Args:
        source, grown: The models.
        prompt: int64 `[1, length]`.
        num_tokens: Tokens to write.
        tolerance: Relative to the largest logit: the grown model's token may be this much below the source's own.
        progress: Told what is being done.
    """
    models = source, grown
    caches = [[LayerCache() for _ in range(model.sizes.num_layers)] for model in models]
    written: tuple[list[int], list[int]] = [], []
    tokens = prompt
    for number in range(num_tokens):
        progress(f"decoding token {number + 1} of {num_tokens}")
        logits = [_next_logits(model, tokens, cache) for model, cache in zip(models, caches, strict=True)]
        for found, choices in zip(logits, written, strict=True):
            choices.append(int(found.argmax()))
        scores, other = logits[0], written[1][-1]
        if not scores[other] >= scores.max() - tolerance * scores.abs().max():
            return Decoding(prompt.shape[1], tuple(written[0]), tuple(written[1]), same=False)
        # Of two equally likely tokens both models go on with the source's.
        tokens = prompt.new_tensor([[written[0][-1]]])
    return Decoding(prompt.shape[1], tuple(written[0]), tuple(written[1]), same=True)


def _next_logits(model: StreamedModel, tokens: Tensor, caches: list[LayerCache]) -> Tensor:
    """The logits after the last of `[1, length]` tokens, float64 `[vocab]`; the cache holds all before them."""
    with torch.no_grad():
        hidden = model.embed(tokens)
        for layer, cache in enumerate(caches):
            hidden = model.attention(layer)(hidden, cache)
            hidden = model.mlp(layer)(hidden)
        last = model.last_norm()(hidden[:, -1])
        step = max(1, HEAD_ELEMENTS // model.sizes.hidden)
        return torch.cat([(last @ rows.T)[0] for rows in model.head_rows(step)]).double()
