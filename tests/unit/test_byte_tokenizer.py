"""The byte tokenizer against the packages that read its files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gdagrow.formats.byte_tokenizer import is_byte_tokenizer, write_byte_tokenizer
from gdagrow.verify import tokens
from gdagrow.verify.tokens import text_tokens
from tests.growths import RANDOM


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(directory, 128)
    return directory


@RANDOM
@given(st.text())
def test_tokens_are_the_bytes_and_decode_to_the_text(directory: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_its_token(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == tokenizer.vocab_size == 256
    text = "".join(map(chr, range(128))) + " Ā\N{SNOWMAN}\N{PILE OF POO}"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.model_max_length == 128
    padded = tokenizer(["ab", "c"], padding=True, padding_side="left")
    assert padded["input_ids"] == [[97, 98], [0, 99]]
    assert padded["attention_mask"] == [[1, 1], [0, 1]]


def test_a_text_is_read_without_the_package(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(b"caf\xc3\xa9 \x00!")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert text_tokens(tmp_path / "text", directory, 256, seqs=1, length=8).tolist() == [list(b"caf\xc3\xa9 \x00!")]
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text() + "\n")
    assert not is_byte_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(tokens.CompareError, match="needs the tokenizers package"):
        text_tokens(tmp_path / "text", tmp_path, 256, seqs=1, length=8)
