"""The tokenizer of models that read bytes, token by byte, in the files that `transformers` expects of one."""

import json
from pathlib import Path
from typing import Any, Final

# Stands for the beginning and end of texts and for padding; a text that has it is still its bytes.
_SPECIAL: Final = "\0"


def write_byte_tokenizer(directory: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a model that was made for texts of `max_length` bytes."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
        "clean_up_tokenization_spaces": False, "bos_token": _SPECIAL, "eos_token": _SPECIAL, "pad_token": _SPECIAL,
    }  # fmt: skip
    (directory / "tokenizer.json").write_bytes(_content())
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_byte_tokenizer(path: Path) -> bool:
    """Whether a `tokenizer.json` is the one that is written here, so that a text's bytes are its tokens."""
    content = _content()
    return path.stat().st_size == len(content) and path.read_bytes() == content


def _content() -> bytes:
    """Byte pair encoding without a merge, over the letters that stand for bytes in it."""
    by_byte: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    vocab = {_SPECIAL: 0} | {letter: byte for byte, letter in enumerate(_letters()) if byte}
    special = {"id": 0, "content": _SPECIAL, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}  # fmt: skip
    model: dict[str, Any] = {"type": "BPE", "vocab": vocab, "merges": []}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
               "pre_tokenizer": by_byte, "post_processor": None, "decoder": by_byte, "model": model}  # fmt: skip
    return (json.dumps(content, indent=1) + "\n").encode()


def _letters() -> list[str]:
    """The letter of every byte, by GPT-2's convention: itself where it shows, else the next from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]
