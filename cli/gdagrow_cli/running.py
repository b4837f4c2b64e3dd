"""What the commands share that run a model: its tokens, its device, and what is shown meanwhile."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.checkpoint import read_checkpoint
from gdagrow.errors import CompareError
from gdagrow.verify.tokens import random_tokens, text_tokens
from gdagrow_cli.console import stderr_console


def tokens_for(source: Path, *, text: Path | None, seqs: int, length: int, seed: int | None) -> Tensor:
    """The tokens to run on: those of a text, or random ones over the vocabulary of `source`.

    Raises:
        CheckpointError: the source cannot be read.
        CompareError: the text cannot be used, or a seed is given beside it.
    """
    if text is not None and seed is not None:
        raise CompareError("--seed is of random tokens and --text brings its own; give one of them")
    config = read_checkpoint(source).config
    vocab = architecture_of(config).sizes(config).vocab
    if text is not None:
        return text_tokens(text, source, vocab, seqs=seqs, length=length)
    return random_tokens(vocab, seqs=seqs, length=length, seed=seed or 0)


def require_device(device: str) -> None:
    """Raises CompareError if torch cannot use a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CompareError(f"--device {device}: cannot be used here ({reason}); cpu always can") from None


@contextmanager
def status(doing: str, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield what shows the step that is being done, on a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    with stderr_console().status(doing) as status:
        yield lambda step: status.update(Text(step))
