"""The text of an experiment: dealt out by content, held out whole, cut where windows stay inside documents."""

import argparse
import gzip
import hashlib
import json
import math
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.errors import CheckpointError, OutputError, TrainError
from gdagrow.experiment.text import PreparedText, prepare_text
from gdagrow.train import baselines
from gdagrow.train.data import open_tokens, prepare_tokens
from gdagrow.train.recipe import DataSource
from tests.growths import RANDOM

ENTRIES = {
    "apple": "n 1: a fruit with red or yellow or green skin",
    "apple tree": "n 1: a tree that bears a fruit with red or yellow or green skin",
    "auto": "n 1: a motor vehicle with four wheels; \"he needs a\n         car to get to work\" [syn: {car}, {auto}]\n"
            "         [ant: {cart}]",
    "car": "n 1: a motor vehicle with four wheels; \"he needs a car to\n         get to work\" [syn: {car},\n"
           "         {auto}]\n    2: a wheeled vehicle adapted to the rails of railroad",
    "railcar": "n 1: a wheeled vehicle adapted to the rails of railroad [syn:\n         {railcar}, {car}]",
    "zyme": "n 1: a substance that ferments",
}  # fmt: skip
# Which entries have a definition in common.
SHARED = {"auto": {"car"}, "car": {"auto", "railcar"}, "railcar": {"car"}}


def entry(word: str) -> str:
    return f"{word}\n    {ENTRIES[word]}"


def write_documents(directory: Path, texts: list[str]) -> str:
    """One file each; returns their pattern."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (directory / f"{number}.txt").write_text(text)
    return str(directory / "*.txt")


def pairs_of(text: str) -> list[str]:
    """It in twos, without an odd one at its end."""
    return [text[start : start + 2] for start in range(0, len(text) - 1, 2)]


def some_texts(count: int = 30) -> list[str]:
    """Documents of 100 to 158 bytes, each with a letter of its own."""
    return ["".join(f"{chr(65 + n)}{k:03}" for k in range(25)) + "." * 2 * n for n in range(count)]


def prepared(pattern: str, target: Path, kind: str = "files", **changes: Any) -> PreparedText:
    return prepare_text([pattern], kind, target, **{"held_out": 0.2, "stretch": 16, **changes})


def read(path: Path) -> str:
    return bytes(np.fromfile(path, "<u2").astype(np.uint8)).decode()


def stretches(text: PreparedText, length: int = 16) -> list[str]:
    held_out = read(text.held_out)
    return [held_out[start : start + length] for start in range(0, len(held_out), length)]


def test_documents_are_whole_on_one_side(tmp_path: Path) -> None:
    texts = some_texts()
    text = prepared(write_documents(tmp_path / "in", texts), tmp_path / "out")
    training = read(text.train).split("\n")
    held_out = sorted(set(texts) - set(training))
    assert (len(training), len(held_out)) == text.documents == (24, 6)
    assert sorted(stretches(text)) == sorted(
        document[start : start + 16] for document in held_out for start in range(0, len(document) - 15, 16)
    )
    assert text.tokens == (len(read(text.train)), 16 * len(stretches(text)))
    sizes = sorted(map(len, held_out))
    assert sum(sizes) >= 0.2 * sum(map(len, texts)) > sum(sizes[:-1]) - sizes[-1], "as much as was asked for"


@settings(RANDOM, max_examples=15)
@given(
    texts=st.lists(st.text("ab", min_size=4, max_size=4), min_size=3, max_size=12, unique=True),
    held_out=st.sampled_from([0.01, 0.3, 0.5]),
)
def test_no_document_is_lost_or_on_both_sides(
    texts: list[str], held_out: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("text")
    pattern = write_documents(directory / "in", [*texts, *texts[:2]])
    text = prepared(pattern, directory / "out", held_out=held_out, stretch=2)
    kept = read(text.train).split("\n")
    assert len(kept) == len(set(kept)) == text.documents[0]
    left = set(texts) - set(kept)
    assert text.documents[1] == len(left)
    assert Counter(stretches(text, 2)) == Counter(pairs_of("".join(left)))


def test_neither_names_nor_places_say_what_is_held_out(tmp_path: Path) -> None:
    texts = some_texts()
    one = prepared(write_documents(tmp_path / "a", texts), tmp_path / "one")
    other = prepared(write_documents(tmp_path / "b", [texts[7], *reversed(texts)]), tmp_path / "other")
    assert one.train.read_bytes() == other.train.read_bytes()
    assert one.held_out.read_bytes() == other.held_out.read_bytes()
    assert read(one.train).split("\n") != sorted(read(one.train).split("\n")), "shuffled"


def test_windows_that_divide_a_stretch_stay_inside_documents(tmp_path: Path) -> None:
    texts = some_texts()
    text = prepared(write_documents(tmp_path / "in", texts), tmp_path / "out")
    source = DataSource(train=(str(text.train),), evaluation=(str(text.held_out),))
    prepare_tokens(source, tmp_path / "tokens", 256, None)
    _, held_out = open_tokens(source, tmp_path / "tokens", 8, 256)
    assert held_out is not None
    assert len(held_out) == text.tokens[1] // 8
    windows = [bytes(held_out[n]["input_ids"].tolist()).decode() for n in range(len(held_out))]
    assert all(any(window in document for document in texts) for window in windows)
    first = {next(document[0] for document in texts if window in document) for window in windows[:12]}
    assert len(first) > 2, "the first ones come from several documents"


def test_names_below_the_pattern_are_left_out(tmp_path: Path) -> None:
    base = tmp_path / "test"  # above what the pattern has before its first star, and so of no concern
    write_documents(base / "lib", some_texts(5))
    write_documents(base / "lib" / "tests", ["a test of something\n" * 5])
    (base / "lib" / "test_it.txt").write_text("another test\n" * 5)
    text = prepared(str(base / "**" / "*.txt"), tmp_path / "out", exclude=["test", "tests", "test_*"], held_out=0.01)
    described = json.loads((tmp_path / "out" / "text.json").read_text())["source"]
    assert [name for name, _ in described["files"]] == [f"lib/{n}.txt" for n in range(5)]
    assert "test" not in read(text.train) + read(text.held_out)
    assert str(tmp_path) not in json.dumps(described["files"])


@pytest.mark.parametrize("name", ["wn.dict", "wn.dict.dz"])
def test_what_is_held_out_of_wordnet_is_under_no_other_headword(name: str, tmp_path: Path) -> None:
    info = "00-database-info\n    This text has a licence.\n"
    content = ("\n" + info + "\n".join(map(entry, ENTRIES)) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".dz") else content)
    left_out = set()
    for share in (0.001, 0.2, 0.4):
        text = prepared(str(tmp_path / name), tmp_path / f"out{share}", "wordnet", held_out=share, stretch=2)
        held_out = next(
            words for words in permutations(ENTRIES, text.documents[1])
            if Counter(pairs_of("\n".join(map(entry, words)))) == Counter(stretches(text, 2))
        )  # fmt: skip
        training = {word for word in ENTRIES if word not in held_out and not SHARED.get(word, set()) & set(held_out)}
        assert read(text.train).count("\n    n 1: ") == text.documents[0] == len(training)
        assert all(entry(word) in read(text.train) for word in training)
        left_out |= set(ENTRIES) - training - set(held_out)
    assert left_out <= SHARED.keys()
    assert left_out, "none of these shares shows it; change the entries"


def test_the_books_of_a_bible(tmp_path: Path) -> None:
    books = {"Ge": ["In the beginning", "And the earth: 2:3 was"], "1Chr": ["Adam, Sheth"], "3Jn": ["The elder"]}
    assert all(sum(len(verse) + 1 for verse in book) % 2 == 0 for book in books.values()), "nothing is dropped"
    verses = [f"{book}1:{n + 1} {verse}" for book, lines in books.items() for n, verse in enumerate(lines)]
    (tmp_path / "kjv.txt").write_text("\n".join(verses) + "\n")
    text = prepared(str(tmp_path / "kjv.txt"), tmp_path / "out", "bible", held_out=0.001, stretch=2)
    documents = ["\n".join(verses) + "\n" for verses in books.values()]
    (held_out,) = (document for document in documents if Counter(pairs_of(document)) == Counter(stretches(text, 2)))
    documents.remove(held_out)
    assert read(text.train) in ("\n".join(documents), "\n".join(documents[::-1]))
    assert text.documents == (2, 1)


def test_baselines_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_COUNTED", 100)
    text = prepared(write_documents(tmp_path / "in", some_texts()), tmp_path / "out")
    training = read(text.train)
    pairs, firsts = Counter(pairwise(training)), Counter(training[:-1])
    losses = [
        -math.log((pairs[a, b] + 1) / (firsts[a] + 256)) for stretch in stretches(text) for a, b in pairwise(stretch)
    ]
    assert text.bigram == pytest.approx(math.fsum(losses) / len(losses), rel=len(losses) * 2**-52)
    whole = [document for document in some_texts() if document not in training]  # not only what fills stretches
    whole.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
    assert text.gzip == baselines.gzip_loss("\n".join(whole).encode())


def test_a_text_as_gzip_packs_it() -> None:
    text = Path(argparse.__file__).read_bytes()
    packed = len(gzip.compress(text, 9)) - 18 + 6  # headers and sums of gzip and of zlib
    assert baselines.gzip_loss(text) == pytest.approx(packed * 8 * math.log(2) / len(text), rel=2**-50)


def test_what_was_made_is_taken_as_it_is(tmp_path: Path) -> None:
    pattern = write_documents(tmp_path / "in", some_texts())
    first = prepared(pattern, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert sorted(path.name for path in written) == ["held-out.bin", "text.json", "train.bin"]
    assert prepared(pattern, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"stretch": 8}, "another stretch,"), ({"held_out": 0.3}, "another held_out,"),
     ({"exclude": ["1.txt"]}, "another exclude, files, sha256,"), ({"kind": "wordnet"}, "another kind,")],
)  # fmt: skip
def test_another_text_in_its_place_is_refused(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    pattern = write_documents(tmp_path / "in", some_texts())
    before = prepared(pattern, tmp_path / "out")
    with pytest.raises(TrainError, match=told) as refused:
        prepared(pattern, tmp_path / "out", **changed)
    assert str(refused.value).endswith("which runs may have read; give another directory, or remove this one")
    assert prepared(pattern, tmp_path / "out") == before


def test_a_file_that_changed_is_refused_even_at_the_same_length(tmp_path: Path) -> None:
    pattern = write_documents(tmp_path / "in", some_texts())
    prepared(pattern, tmp_path / "out")
    (tmp_path / "in" / "3.txt").write_text(some_texts()[3].swapcase())
    with pytest.raises(TrainError, match="made with another sha256, which runs may have read"):
        prepared(pattern, tmp_path / "out")


def test_a_directory_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    pattern = write_documents(tmp_path / "in", some_texts())
    prepared(pattern, tmp_path / "out")
    (tmp_path / "out" / "train.bin").write_bytes(b"ab")
    with pytest.raises(TrainError, match=r"train\.bin is not as long as text\.json says; remove the directory"):
        prepared(pattern, tmp_path / "out")
    (tmp_path / "out" / "text.json").write_text('{"source": 3}')
    with pytest.raises(TrainError, match=r"text\.json is not what gdagrow experiment wrote; remove"):
        prepared(pattern, tmp_path / "out")
    (tmp_path / "out" / "text.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"text\.json: not valid JSON"):
        prepared(pattern, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("")
    with pytest.raises(OutputError, match="other exists and is not empty; remove it"):
        prepared(pattern, tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "told"),
    [("files", "data: {} matches no file; give the path of a text, or a pattern"),
     ("wordnet", "data: {} matches no file; apt-get install dict-wn puts it into /usr/share/dictd/wn.dict.dz"),
     ("bible", "data: {} matches no file; apt-get install bible-kjv, then bible -f 'Gen1:1-Rev22:21' > FILE"),
     ("poems", "text: kind 'poems' is unknown, expected files, wordnet, bible")],
)  # fmt: skip
def test_text_that_is_not_there(kind: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError) as refused:
        prepared(str(tmp_path / "none"), tmp_path / "out", kind)
    assert str(refused.value) == told.format(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_no_use(tmp_path: Path) -> None:
    pattern = write_documents(tmp_path / "in", ["just one\n"])
    with pytest.raises(TrainError, match="0 training documents and 0 held-out stretches of 16 tokens are too few"):
        prepared(pattern, tmp_path / "out")
    with pytest.raises(TrainError, match="no document of kind bible in 1 files; give others"):
        prepared(pattern, tmp_path / "out", "bible")
    (tmp_path / "wn.dict.dz").write_bytes(gzip.compress(b"apple\n    n 1: a fruit\n")[:-9])
    with pytest.raises(TrainError, match=r"wn\.dict\.dz cannot be read \(.*\); restore it, or give another file"):
        prepared(str(tmp_path / "wn.dict.dz"), tmp_path / "out", "wordnet")
    assert not (tmp_path / "out").exists()
