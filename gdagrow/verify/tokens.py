"""Token sequences to compare two models on: random ones, or a text's."""

from pathlib import Path

import torch
from torch import Tensor

from gdagrow.errors import CompareError
from gdagrow.formats.byte_tokenizer import is_byte_tokenizer
from gdagrow.formats.links import require_inside


def random_tokens(vocab_size: int, *, seqs: int, length: int, seed: int) -> Tensor:
    """Uniform random tokens, int64 `[seqs, length]`, the same for the same seed."""
    return torch.randint(vocab_size, (seqs, length), generator=torch.Generator().manual_seed(seed))


def text_tokens(text: Path, directory: Path, vocab_size: int, *, seqs: int, length: int) -> Tensor:
    """The first tokens of a text by a checkpoint's `tokenizer.json`, or its bytes where there is none.

    Returns:
        int64 `[rows, length]` with at most `seqs` rows, or one shorter row if the text has no more.

    Raises:
        CompareError: the text cannot be read or is too short, or its tokens are not the model's.
    """
    ids = _token_ids(text, directory)[: seqs * length]
    if len(ids) < 2:
        raise CompareError(f"{text}: expected a text of at least two tokens, got {len(ids)}; choose a longer one")
    if max(ids) >= vocab_size:
        raise CompareError(
            f"{text}: token {max(ids)} is outside the vocabulary of {vocab_size}; {directory} has no tokenizer.json "
            "of this model, use random tokens instead"
        )
    rows = max(1, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, -1)


def _token_ids(text: Path, directory: Path) -> list[int]:
    try:
        content = text.read_bytes()
    except OSError as error:
        raise CompareError(f"{text} cannot be read ({error.strerror}); give a text file") from None
    path = directory / "tokenizer.json"
    if not path.exists() or is_byte_tokenizer(path):
        return list(content)
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise CompareError(
            f"{path} needs the tokenizers package: pip install 'gdagrow[text]', or use random tokens"
        ) from None
    require_inside(directory, path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
        ids: list[int] = tokenizer.encode(content.decode(errors="replace")).ids
    except Exception as error:  # the tokenizers package raises plain Exception
        raise CompareError(f"{path} cannot be used ({error}); use random tokens instead") from None
    return ids
