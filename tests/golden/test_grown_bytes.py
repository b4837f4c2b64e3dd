"""The bytes of small grown checkpoints, pinned: a growth made today can be repeated with any later version."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.output import weights_output
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from tests.checkpoints import write_checkpoint

GROWTHS: dict[str, dict[str, Any]] = {
    # Every axis, copies 2, 3 and 4, two counts in one tensor.
    "noise": {"signal": "4:1", "noise": 2, "kv": 2, "hidden": 3, "ffn": 4, "snr_db": 30.0, "seed": 0},
    "default noise": {"uniform": 2},
    "exact copies": {"signal": "4:1", "noise": 2, "kv": 2, "hidden": 3, "ffn": 4, "exact_copies": True},
}

PINNED = {
    ("noise", torch.bfloat16): "102eadee034e410dcfdf69386d1648cda92521a93a6b2b7d2c56857d66941d8a",
    ("noise", torch.float16): "0ecc35e49c55c33783b77c1712b97be4384493cad76dc8edfb19687bc4d135cd",
    ("noise", torch.float32): "fe47e7bd4523b17224c732c2c344ad265f857c670f1ae4c24c6543b34538d5ea",
    ("noise", torch.float64): "411f396c3dd9c76a08df4a631043da2b99222022f0abffcbb1e1b7fe49f68c3c",
    ("default noise", torch.bfloat16): "7112e154bb50a43ba11671e65519de23b1f78fbfe3859c4fc42c02447018c96f",
    ("default noise", torch.float32): "fde2c7f23e376c4bee53b2f64368b28dd137cb62f7a6ac77a4a8b287620cee8f",
    ("exact copies", torch.bfloat16): "0e386345c316844ee1158f12f03b32ad7911ce6e04fd3cbfa4023c5f23d83e0c",
    ("exact copies", torch.float32): "76495ef0b899bc710b17c76a9eac2ecb960ea79545687e52e802671cdee32f11",
}

CHANGED = """The grown bytes of {case} are not those that gdagrow wrote before: got sha256
{got}
If the stream of random words, the split, the order of heads or the layout of files was changed on purpose, say so in
CHANGELOG.md (growths made before can no longer be repeated bit for bit, their function is as exact as ever) and pin the
new value in PINNED. Otherwise a change that should not touch the output did: find it."""


def weights_by_arithmetic(shape: torch.Size, start: int) -> torch.Tensor:
    """Values in +-1 of all magnitudes from integers alone, so that no random generator stands behind the source."""
    index = torch.arange(start, start + shape.numel(), dtype=torch.int64)
    mantissa = (index * 2654435761 % 1_000_003).double() / 1_000_003 - 0.5
    return torch.ldexp(mantissa * 2, -(index * 7919 % 13)).reshape(shape)


def write_source(directory: Path, dtype: torch.dtype) -> None:
    write_checkpoint(
        directory, groups=2, ratio=3, kv_groups=1, head_dim=4, hidden=10, ffn=6, vocab=13, layers=2, tied=True,
        bias=True, dtype=dtype, lambda_dtype=torch.promote_types(dtype, torch.float32),
    )  # fmt: skip
    stored, start = load_file(directory / "model.safetensors"), 0
    for name in sorted(stored):
        stored[name] = weights_by_arithmetic(stored[name].shape, start).to(stored[name].dtype)
        start += stored[name].numel()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("growth", "dtype"), PINNED, ids=lambda value: str(value).removeprefix("torch."))
def test_grown_bytes(tmp_path: Path, growth: str, dtype: torch.dtype) -> None:
    write_source(tmp_path / "source", dtype)
    plan = make_plan(read_header(tmp_path / "source"), make_recipe(GROWTHS[growth]))
    expand(plan, tmp_path / "grown", weights_output(plan, 10**9))
    got = hashlib.sha256((tmp_path / "grown" / "model.safetensors").read_bytes()).hexdigest()
    assert got == PINNED[growth, dtype], CHANGED.format(case=f"{growth!r} in {dtype}", got=got)


def test_the_source_is_what_it_was(tmp_path: Path) -> None:
    """So that a changed source is not taken for a changed growth."""
    write_source(tmp_path / "source", torch.float64)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(name.encode() + stored[name].numpy().tobytes())
    assert digest.hexdigest() == "6738378586b07f33468c86782028660c2f2820ee87815bad277665f8a42a289e"
