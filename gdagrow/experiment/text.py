"""The text of an experiment: documents dealt out by a hash of their content, bytes as tokens, and their baselines."""

import glob
import gzip
import hashlib
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gdagrow.errors import OutputError, TrainError
from gdagrow.formats.publish import staged
from gdagrow.formats.strict_json import parse_object
from gdagrow.train.baselines import bigram_loss, gzip_loss
from gdagrow.train.data import in_stdlib, matching_files

_TRAIN, _HELD_OUT, _DESCRIPTION = "train.bin", "held-out.bin", "text.json"
_TOKEN_BYTES: Final = 2
_BETWEEN: Final = b"\n"
_VERSE: Final = re.compile(rb"(\w+?)\d+:\d+ (.*)")
_SENSE: Final = re.compile(rb"\s(?:(?:n|v|adj|adv) )?\d+: ")
_RELATED: Final = re.compile(rb"\[(?:syn|ant|also): [^\]]*\]")


@dataclass(frozen=True)
class PreparedText:
    """A text ready to train on.

    train, held_out: Files of uint16 tokens, a byte each, for `gdagrow.train.recipe.DataSource`.
    documents, tokens: How many there are, in training and held out.
    bigram: Nats per byte of a bigram model of the training text on the held-out stretches.
    gzip: Nats per byte of `gzip -9` on the held-out documents, one after another.
    """

    train: Path
    held_out: Path
    documents: tuple[int, int]
    tokens: tuple[int, int]
    bigram: float
    gzip: float


@dataclass(frozen=True)
class _Kind:
    """How a file becomes documents.

    documents: Those of the content of a file.
    advice: What to do if there is no such file.
    joined: Whether documents are shorter than a stretch, so that held-out ones are joined before they are cut.
    parts: What of a document must not be in the training text if the document is held out.
    """

    documents: Callable[[bytes], Iterable[bytes]]
    advice: str
    joined: bool = False
    parts: Callable[[bytes], Iterable[bytes]] = lambda document: ()


def _books(text: bytes) -> Iterator[bytes]:
    """The books of lines such as `1Chr2:3 And the sons of Judah`, without these references."""
    books: dict[bytes, list[bytes]] = {}
    for line in text.splitlines():
        if found := _VERSE.match(line):
            books.setdefault(found.group(1), []).append(found.group(2))
    yield from (b"\n".join(verses) + b"\n" for verses in books.values())


def _entries(text: bytes) -> Iterator[bytes]:
    """The entries of a dictionary: a line for the headword, and lines that are set in for its senses."""
    for entry in re.split(rb"\n(?=\S)", text):
        if entry.strip() and not entry.startswith(b"00-database"):
            yield entry.strip(b"\n")


def _senses(entry: bytes) -> Iterator[bytes]:
    """What an entry says of each sense, the same under every synonym; without the lists of those."""
    _, *senses = _SENSE.split(b" ".join(entry.split()))
    yield from (_RELATED.sub(b"", sense).strip() for sense in senses)


KINDS: Final[Mapping[str, _Kind]] = {
    "files": _Kind(lambda text: (text,), "give the path of a text, or a pattern"),
    "wordnet": _Kind(_entries, "apt-get install dict-wn puts it into /usr/share/dictd/wn.dict.dz", True, _senses),
    "bible": _Kind(_books, "apt-get install bible-kjv, then bible -f 'Gen1:1-Rev22:21' > FILE"),
}


def prepare_text(
    patterns: Sequence[str],
    kind: str,
    directory: Path,
    *,
    held_out: float,
    stretch: int,
    exclude: Sequence[str] = (),
) -> PreparedText:
    """Make the tokens of an experiment in `directory`, or take those that were made there of the same text.

    Equal documents count once. They are put into the order of the hashes of their contents, which is what shuffles
    them, and the first are held out, until they have the share asked for: whole documents, whatever their places or
    names. Held-out documents are cut into stretches, what is left at an end is dropped, and the stretches are put into
    the order of their hashes, so that the first of them are a fair sample. Training documents follow one another, a
    newline between two.

    Args:
        patterns: Files or globs; `{stdlib}` stands for Python's own library.
        kind: What is a document: each file (`files`); an entry of WordNet in `dictd`'s format, packed or not
            (`wordnet`), held out together with its definitions under other headwords; a book in the output of
            `bible -f` (`bible`), without the references before verses.
        directory: Where to put `train.bin`, `held-out.bin` and `text.json`; missing, or made by this function.
        held_out: Share of the bytes.
        stretch: Tokens of a held-out stretch: windows of a length that divides it have text of one document (but for
            entries, which are shorter).
        exclude: Patterns for names of files and directories, below what a glob has before its first `*`; what
            matches one is left out.

    Raises:
        TrainError: a file is missing or cannot be read, the text is too short, or `directory` has another text.
        OutputError: `directory` cannot be made.
    """
    if kind not in KINDS:
        raise TrainError(f"text: kind {kind!r} is unknown, expected {', '.join(KINDS)}")
    if not 0 < held_out < 1 or stretch < 2:
        raise TrainError(
            f"text: expected held_out between 0 and 1 and a stretch of 2 tokens or more, got {held_out} and {stretch}"
        )
    documents, files = _read(patterns, kind, exclude)
    source = {
        "patterns": list(patterns), "kind": kind, "exclude": list(exclude), "held_out": held_out, "stretch": stretch,
        "files": files, "sha256": hashlib.sha256(b"".join(sorted(documents))).hexdigest(),
    }  # fmt: skip
    if not (directory / _DESCRIPTION).exists():
        _make(documents, KINDS[kind], directory, source)
    return _reopened(directory, source)


def _read(patterns: Sequence[str], kind: str, exclude: Sequence[str]) -> tuple[dict[bytes, bytes], list[list[Any]]]:
    """The documents by the hashes of their contents, and the name and size of each file."""
    documents: dict[bytes, bytes] = {}
    files: list[list[Any]] = []
    for pattern in patterns:
        above = _above(in_stdlib(pattern))
        for path in matching_files(pattern, KINDS[kind].advice):
            name = path.relative_to(above)
            if any(fnmatchcase(part, wrong) for part in name.parts for wrong in exclude):
                continue
            content = _content(path)
            files.append([name.as_posix(), len(content)])
            documents |= {hashlib.sha256(each).digest(): each for each in KINDS[kind].documents(content) if each}
    if not documents:
        raise TrainError(f"text: {', '.join(patterns)}: no document of kind {kind} in {len(files)} files; give others")
    return documents, files


def _above(pattern: str) -> Path:
    """The directory that a pattern has before its first wildcard."""
    parent = Path(pattern).absolute().parent
    return next((path for path in [parent, *parent.parents] if not glob.has_magic(str(path))), parent)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".dz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise TrainError(f"text: {path} cannot be read ({error}); restore it, or give another file") from None


def _make(documents: Mapping[bytes, bytes], kind: _Kind, directory: Path, source: Mapping[str, Any]) -> None:
    held_out, training = _dealt(documents, kind, source["held_out"])
    stretches = _stretches([_BETWEEN.join(held_out)] if kind.joined else held_out, source["stretch"])
    text = _BETWEEN.join(training)
    if len(text) < 2 or not stretches:
        raise TrainError(
            f"text: {', '.join(source['patterns'])}: {len(training)} training documents and {len(stretches)} held-out "
            f"stretches of {source['stretch']} tokens are too few; give more text or shorter stretches"
        )
    ids = torch.tensor(np.frombuffer(b"".join(stretches), np.uint8).astype(np.int64)).view(len(stretches), -1)
    described = {
        "documents": (len(training), len(held_out)), "tokens": (len(text), ids.numel()),
        "bigram": bigram_loss(torch.frombuffer(bytearray(text), dtype=torch.uint8), ids),
        "gzip": gzip_loss(_BETWEEN.join(held_out)),  # whole: short stretches would leave it little to look back on
    }  # fmt: skip
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        with staged(directory) as partial:
            for name, content in ((_TRAIN, text), (_HELD_OUT, b"".join(stretches))):
                (partial / name).write_bytes(np.frombuffer(content, np.uint8).astype("<u2").tobytes())
            (partial / _DESCRIPTION).write_text(json.dumps({"source": source, **described}, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror}); choose another place") from None


def _dealt(documents: Mapping[bytes, bytes], kind: _Kind, share: float) -> tuple[list[bytes], list[bytes]]:
    """Held-out documents and training ones, each in the order of their hashes."""
    ordered = [documents[digest] for digest in sorted(documents)]
    sizes = list(accumulate(map(len, ordered)))
    count = bisect_left(sizes, share * sizes[-1]) + 1
    held_out = ordered[:count]
    hidden = {part for document in held_out for part in kind.parts(document)}
    return held_out, [document for document in ordered[count:] if hidden.isdisjoint(kind.parts(document))]


def _stretches(documents: Iterable[bytes], length: int) -> list[bytes]:
    whole = (
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    )
    return sorted(whole, key=lambda stretch: hashlib.sha256(stretch).digest())


def _reopened(directory: Path, source: Mapping[str, Any]) -> PreparedText:
    path = directory / _DESCRIPTION
    described = parse_object(path.read_bytes(), str(path))
    try:
        changed = [key for key in source if described["source"].get(key) != source[key]]
        documents, tokens = tuple(described["documents"]), tuple(described["tokens"])
        baselines = float(described["bigram"]), float(described["gzip"])
        prepared = PreparedText(directory / _TRAIN, directory / _HELD_OUT, documents, tokens, *baselines)
        wrong = [
            file.name
            for file, count in zip((prepared.train, prepared.held_out), tokens, strict=True)
            if not file.is_file() or file.stat().st_size != _TOKEN_BYTES * count
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise TrainError(f"{path} is not what gdagrow experiment wrote; remove {directory} to make it anew") from None
    if changed:
        raise TrainError(
            f"{directory} has a text that was made with another {', '.join(changed)}, which runs may have read; give "
            "another directory, or remove this one"
        )
    if wrong:
        raise TrainError(f"{directory}: {', '.join(wrong)} is not as long as {path.name} says; remove the directory")
    return prepared
