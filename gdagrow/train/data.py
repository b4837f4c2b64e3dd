"""The tokens of a run: text, JSONL and parquet made into one file of tokens, or token files mapped as they are."""

import glob
import json
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gdagrow.errors import TrainError
from gdagrow.train.recipe import DataSource

# Stands in a path for the directory of Python's own library: text that is there wherever this runs.
STDLIB: Final = "{stdlib}"

_TEXT_BYTES: Final = 2**22  # of a text that are tokenised at once, up to the end of a line
_ROWS: Final = 1000  # of JSONL or parquet that are tokenised at once
_DESCRIPTION: Final = "data.json"
_WHOLE_NUMBERS: Final = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TokenFile:
    """Tokens on the disk: `num_tokens` little-endian numbers of `dtype` after `offset` bytes."""

    path: Path
    dtype: str
    offset: int
    num_tokens: int

    def open(self) -> Array:
        """The tokens, mapped, not read."""
        return np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r", self.offset, (self.num_tokens,))


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of `length` tokens, one after another, none across two files.

    Args:
        files: Where the tokens lie.
        length: Tokens of a stretch.
        vocab: Every token must be below it.
        begin, end: The stretches `[begin, end)` of all that the files hold; to the last one if None.
    """

    def __init__(
        self, files: Sequence[TokenFile], length: int, vocab: int, begin: int = 0, end: int | None = None
    ) -> None:
        self._files = tuple(file for file in files if file.num_tokens >= length)
        self._length, self._vocab = length, vocab
        self._arrays = [file.open() for file in self._files]
        self._starts = list(accumulate((file.num_tokens // length for file in self._files), initial=0))
        self._begin, self._end = begin, self._starts[-1] if end is None else end

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, both int64 `[length]` and the same: the model shifts them."""
        at = self._begin + index
        file = bisect_right(self._starts, at) - 1
        start = (at - self._starts[file]) * self._length
        ids = torch.from_numpy(self._arrays[file][start : start + self._length].astype(np.int64))
        if int(ids.max()) >= self._vocab:
            raise TrainError(
                f"{self._files[file].path}: token {int(ids.max())} after {start} is outside the model's vocabulary of "
                f"{self._vocab}; tokenise the text for this model"
            )
        return {"input_ids": ids, "labels": ids}

    def part(self, begin: int, end: int) -> "Windows":
        """The stretches `[begin, end)` of these."""
        return Windows(self._files, self._length, self._vocab, self._begin + begin, self._begin + end)


def in_stdlib(pattern: str) -> str:
    """A path or pattern with Python's own library where it says so."""
    return pattern.replace(STDLIB, sysconfig.get_path("stdlib"))


def matching_files(pattern: str, advice: str = "give the path of a text, JSONL, parquet or token file") -> list[Path]:
    """The files of a path or pattern, in their order.

    Raises:
        TrainError: there is none; `advice` says what to do.
    """
    wanted = in_stdlib(pattern)
    found = sorted(Path(path).absolute() for path in glob.glob(wanted, recursive=True) if os.path.isfile(path))
    if not found:
        raise TrainError(f"data: {pattern} matches no file; {advice}")
    return found


def require_files(source: DataSource) -> None:
    """Raises TrainError if a path or pattern matches no file."""
    for pattern in (*source.train, *(source.evaluation or ())):
        matching_files(pattern)


def prepare_tokens(source: DataSource, directory: Path, vocab: int, end_of_text: int | None) -> None:
    """Tokenise what is text, into `directory`, and write down which files there are; token files stay where they are.

    Args:
        source: Which text.
        directory: An empty or missing directory.
        vocab: Size of the model's vocabulary.
        end_of_text: The token after each text file or row, if the model has one.

    Raises:
        TrainError: a file is missing or cannot be read, or its tokens are not the model's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"source": source.model_dump(mode="json")}
    for part, patterns in (("train", source.train), ("evaluation", source.evaluation)):
        described[part] = _prepared(patterns, source, directory, part, vocab, end_of_text) if patterns else []
    (directory / _DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def open_tokens(source: DataSource, directory: Path, length: int, vocab: int) -> tuple[Windows, Windows | None]:
    """Training stretches and held-out ones of prepared tokens.

    Raises:
        TrainError: the tokens were prepared of other data, are gone, or are too few.
    """
    try:
        described = json.loads((directory / _DESCRIPTION).read_bytes())
        parts = {
            part: [
                TokenFile(directory / f["path"], _whole_numbers(f["dtype"]), f["offset"], f["num_tokens"])
                for f in described[part]
            ]
            for part in ("train", "evaluation")
        }
        train = Windows(parts["train"], length, vocab)
        held_out = Windows(parts["evaluation"], length, vocab) if parts["evaluation"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise TrainError(f"{directory} cannot be read ({error}); restore it, or start the run again") from None
    if source.held_out:
        cut = len(train) - max(1, round(len(train) * source.held_out))
        train, held_out = train.part(0, max(0, cut)), train.part(max(0, cut), len(train))
    for windows, name in ((train, "training"), (held_out, "held-out")):
        if windows is not None and len(windows) == 0:
            raise TrainError(f"data: the {name} text is shorter than one sequence of {length} tokens; give more of it")
    return train, held_out


def _whole_numbers(name: Any) -> str:
    """The dtype of tokens, by the only names that are shown to numpy, which evaluates what is more."""
    if name not in _WHOLE_NUMBERS:
        raise ValueError(f"tokens of dtype {name!r}")
    return str(name)


def _prepared(
    patterns: Iterable[str], source: DataSource, directory: Path, part: str, vocab: int, end_of_text: int | None
) -> list[dict[str, Any]]:
    paths = [path for pattern in patterns for path in matching_files(pattern)]
    texts = [path for path in paths if path.suffix not in (".bin", ".npy")]
    files = [_token_file(path, source.token_dtype) for path in paths if path not in texts]
    if texts:
        files.append(_tokenised(texts, source, directory / f"{part}.bin", vocab, end_of_text))
    return [
        {"path": os.path.relpath(file.path, directory) if file.path.parent == directory else str(file.path),
         "dtype": file.dtype, "offset": file.offset, "num_tokens": file.num_tokens}
        for file in files
    ]  # fmt: skip


def _token_file(path: Path, dtype: str) -> TokenFile:
    if path.suffix == ".bin":
        return TokenFile(path, dtype, 0, path.stat().st_size // np.dtype(dtype).itemsize)
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}); give an array of tokens that numpy.save wrote") from None
    if array.ndim != 1 or array.dtype.kind not in "ui" or not isinstance(array, np.memmap):
        raise TrainError(
            f"{path} is {array.dtype} with {array.ndim} dimensions, expected whole numbers in one dimension; write "
            "the tokens one after another"
        )
    return TokenFile(path, array.dtype.name, array.offset, len(array))


def _tokenised(
    texts: Sequence[Path], source: DataSource, target: Path, vocab: int, end_of_text: int | None
) -> TokenFile:
    dtype = np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)
    encode = _encoder(source.tokenizer)
    end = np.array([] if end_of_text is None else [end_of_text], dtype)
    num_tokens = 0
    with target.open("wb") as file:
        for path in texts:
            rows = _rows(path, source.text_key) if path.suffix in (".jsonl", ".parquet") else None
            for ids in _encoded(encode, _pieces(path) if rows is None else rows, end if rows is not None else end[:0]):
                _require_known(ids, vocab, path, source.tokenizer)
                file.write(ids.astype(dtype).data)  # tofile loses what the disk refuses last
                num_tokens += len(ids)
            if rows is None:
                file.write(end.data)
                num_tokens += len(end)
    return TokenFile(target, dtype.name, 0, num_tokens)


def _require_known(ids: Array, vocab: int, path: Path, tokenizer: str) -> None:
    if len(ids) and int(ids.max()) >= vocab:
        raise TrainError(
            f"{path}: token {int(ids.max())} of tokenizer {tokenizer} is outside the model's vocabulary of {vocab}; "
            "give the model's own tokenizer"
        )


def _pieces(path: Path) -> Iterator[list[bytes]]:
    """A text in pieces of whole lines."""
    try:
        with path.open("rb") as file:
            while piece := file.read(_TEXT_BYTES):
                yield [piece + file.readline()]
    except OSError as error:
        raise TrainError(f"{path} cannot be read ({error.strerror}); give another file") from None


def _rows(path: Path, key: str) -> Iterator[list[bytes]]:
    """The texts of a JSONL or parquet file, some rows at a time."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise TrainError(f"{path} needs the datasets package: pip install 'gdagrow[train]'") from None
    datasets.utils.logging.set_verbosity_error()
    kind = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    rows: list[bytes] = []
    try:
        for row in datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True):
            rows.append(_text_of(row, key, path))
            if len(rows) == _ROWS:
                yield rows
                rows = []
    except TrainError:
        raise
    except Exception as error:  # the datasets package raises whatever its parsers do
        raise TrainError(f"{path} cannot be read ({' '.join(str(error).split()[:40])}); repair the file") from None
    yield rows


def _text_of(row: Mapping[str, Any], key: str, path: Path) -> bytes:
    if not isinstance(row.get(key), str):
        raise TrainError(f"{path}: expected a text under {key!r} in every row, got {', '.join(row)}; set data.text_key")
    return str(row[key]).encode("utf-8", "surrogatepass")


def _encoder(tokenizer: str) -> Any:
    """What takes a list of texts and gives a list of lists of tokens; None for bytes as they are."""
    if tokenizer == "bytes":
        return None
    path = Path(tokenizer) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise TrainError(f"{path} needs the tokenizers package: pip install 'gdagrow[train]'") from None
    try:
        encoder = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise TrainError(f"data.tokenizer: {path} cannot be used ({error}); give bytes or a directory") from None
    return lambda texts: [
        found.ids for found in encoder.encode_batch([text.decode(errors="replace") for text in texts],
                                                    add_special_tokens=False)
    ]  # fmt: skip


def _encoded(encode: Any, batches: Iterable[list[bytes]], end: Array) -> Iterator[Array]:
    for texts in batches:
        if encode is None:
            yield from (np.concatenate([np.frombuffer(text, np.uint8), end]) for text in texts)
        else:
            yield from (np.concatenate([np.array(ids, np.int64), end]) for ids in encode(texts))
