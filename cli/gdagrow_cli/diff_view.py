"""`gdagrow diff`: whether two checkpoints compute the same."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.errors import CompareError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.verify.logits import Comparison, compare
from gdagrow.verify.tokens import random_tokens, text_tokens
from gdagrow_cli.console import print_json, stderr_console, stdout_console
from gdagrow_cli.plan_view import print_section


def tokens_for(source: Path, *, text: Path | None, seqs: int, length: int, seed: int | None) -> Tensor:
    """The tokens to compare on: those of a text, or random ones over the source's vocabulary.

    Raises:
        CheckpointError: the source cannot be read.
        CompareError: the text cannot be used, or a seed is given beside it.
    """
    if text is not None and seed is not None:
        raise CompareError("--seed is of random tokens and --text brings its own; give one of them")
    config = read_header(source).config
    vocab = architecture_of(config).sizes(config).vocab
    if text is not None:
        return text_tokens(text, source, vocab, seqs=seqs, length=length)
    return random_tokens(vocab, seqs=seqs, length=length, seed=seed or 0)


def show_diff(source: Path, grown: Path, tokens: Tensor, *, dtype: str, device: str, as_json: bool) -> bool:
    """Compare two checkpoints and print how they differ; returns whether they are the same function.

    Raises:
        GdagrowError: they cannot be compared.
    """
    _require_device(device)
    with _status(shown=not as_json) as tell:
        comparison = compare(source, grown, tokens, dtype=getattr(torch, dtype), device=device, progress=tell)
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print(stdout_console(), comparison)
    return comparison.equivalent


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CompareError(f"--device {device}: cannot be used here ({reason}); cpu always can") from None


@contextmanager
def _status(*, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield what shows the step that is being done, on a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    with stderr_console().status("comparing") as status:
        yield lambda step: status.update(Text(step))


def _print(console: Console, comparison: Comparison) -> None:
    within = "within" if comparison.equivalent else "beyond"
    verdict = ("the same function", "bold green") if comparison.equivalent else ("different", "bold red")
    console.print(Text.assemble(verdict, f": {within} what rounding alone may do"))
    tokens = f"{comparison.num_sequences} x {comparison.length} tokens, computed in {comparison.dtype}"
    print_section(console, f"Logits on {tokens}", _figures_table(comparison))
    if comparison.changes:
        print_section(console, "Changes", _changes_table(comparison))


def _figures_table(comparison: Comparison) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_row("largest difference", f"{comparison.max_abs:.3g}")
    table.add_row("relative to the largest logit", f"{comparison.max_rel:.3g}")
    table.add_row("tolerance for that", f"{comparison.tolerance:.3g}")
    table.add_row("KL divergence, nats a token", f"{comparison.kl:.3g}")
    table.add_row("same most likely token", f"{comparison.top1_agreement:.2%}")
    return table


def _changes_table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("source", justify="right")
    table.add_column("grown", justify="right")
    for change in comparison.changes:
        table.add_row(change.what, change.source, change.grown)
    return table
