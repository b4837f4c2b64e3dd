"""Tokens of a run: every kind of file comes to the same tokens, cut into windows, held out, and refused if not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdagrow.errors import TrainError
from gdagrow.train.data import open_tokens, prepare_tokens
from gdagrow.train.recipe import DataSource

TEXT = "grouped differential attention\n" * 20


def tokens(tmp_path: Path, vocab: int = 256, end: int | None = None, length: int = 4, **source: Any) -> torch.Tensor:
    """All training windows of a source, one after another."""
    made = DataSource(**source)
    prepare_tokens(made, tmp_path / "tokens", vocab, end)
    train, _ = open_tokens(made, tmp_path / "tokens", length, vocab)
    return torch.cat([train[index]["input_ids"] for index in range(len(train))])


def as_tokens(text: str, length: int = 4) -> torch.Tensor:
    ids = torch.tensor(list(text.encode()))
    return ids[: len(ids) // length * length]


def test_text_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    assert torch.equal(tokens(tmp_path, train=str(tmp_path / "a.txt")), as_tokens(TEXT))


def test_texts_come_in_the_order_of_their_names_with_the_end_of_text_between(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("cdef")
    (tmp_path / "a.txt").write_text("ab")
    assert tokens(tmp_path, end=0, train=str(tmp_path / "*.txt")).tolist() == [97, 98, 0, 99, 100, 101, 102, 0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_through_datasets(kind: str, tmp_path: Path) -> None:
    rows = [{"words": f"text number {number}", "id": number} for number in range(7)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    expected = as_tokens("".join(row["words"] + "\0" for row in rows))  # type: ignore[misc]
    assert torch.equal(tokens(tmp_path, end=0, train=str(path), text_key="words"), expected)
    with pytest.raises(TrainError, match=r"expected a text under 'text' in every row, got words, id; set"):
        tokens(tmp_path, train=str(path))


def test_token_files_are_used_where_they_are(tmp_path: Path) -> None:
    ids = np.arange(64, dtype=np.uint16)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", ids.astype(np.int64) + 64)
    found = tokens(tmp_path, train=[str(tmp_path / "a.bin"), str(tmp_path / "b.npy")])
    assert found.tolist() == list(range(128))
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["data.json"]


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("one two\nthree one\n" * 4)
    source = {"train": str(tmp_path / "a.txt"), "tokenizer": str(tmp_path)}
    assert tokens(tmp_path, vocab=3, **source).tolist() == [0, 1, 2, 0] * 4
    with pytest.raises(TrainError, match=r"token 2 of tokenizer .* is outside the model's vocabulary of 2; give the"):
        tokens(tmp_path, vocab=2, **source)


def test_the_end_of_the_text_is_held_out(tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    source = DataSource(train=(str(tmp_path / "a.bin"),), held_out=0.2)
    prepare_tokens(source, tmp_path / "tokens", 256, None)
    train, held_out = open_tokens(source, tmp_path / "tokens", 10, 256)
    assert held_out is not None
    assert (len(train), len(held_out)) == (8, 2)
    assert (int(train[7]["input_ids"][-1]), int(held_out[0]["input_ids"][0])) == (79, 80)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "matches no file; give the path of a text"),
        ("a.bin", b"\xff\xff" * 8, "token 65535 after 0 is outside the model's vocabulary of 256; tokenise"),
        ("a.npy", b"no array", "cannot be read"),
        ("a.txt", b"", "the training text is shorter than one sequence of 4 tokens"),
        ("a.txt", b"abc", "the training text is shorter than one sequence of 4 tokens"),
        ("a.jsonl", b'{"text": 3}\n', "expected a text under 'text'"),
        ("a.jsonl", b"{broken", "cannot be read"),
        ("a.parquet", b"broken", "cannot be read"),
    ],
)
def test_what_is_not_fit_is_refused(name: str, content: bytes | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError) as refused:
        tokens(tmp_path, train=str(tmp_path / name))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(8))
    with pytest.raises(TrainError, match="is float64 with 1 dimensions, expected whole numbers"):
        tokens(tmp_path, train=str(tmp_path / "a.npy"))


def test_bytes_beyond_a_small_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(TrainError, match="token 117 of tokenizer bytes is outside the model's vocabulary of 61"):
        tokens(tmp_path, vocab=61, train=str(tmp_path / "a.txt"))


@pytest.mark.parametrize("dtype", ["5int16", "float32", [], {}, None, "O", "int16,(2**9)int8"])
def test_tokens_described_as_anything_but_whole_numbers(tmp_path: Path, dtype: Any) -> None:
    source = DataSource(train=[str(tmp_path / "text.txt")])
    (tmp_path / "text.txt").write_text("a text of some length")
    prepare_tokens(source, tmp_path / "tokens", 256, None)
    path = tmp_path / "tokens" / "data.json"
    described = json.loads(path.read_text())
    described["train"][0]["dtype"] = dtype
    path.write_text(json.dumps(described))
    with pytest.raises(TrainError, match=r"tokens cannot be read \(.*\); restore it, or start the run again"):
        open_tokens(source, tmp_path / "tokens", 4, 256)
