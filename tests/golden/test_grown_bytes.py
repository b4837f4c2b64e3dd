"""The bytes of small grown checkpoints, pinned: a growth made today can be repeated with any later version."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
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
    ("noise", torch.bfloat16): "6f05373b974cf40d1a03c6ab48a0134e80d7a9a8a340b90dba47d251751bbb94",
    ("noise", torch.float16): "3ddc1ebc9a91464c3ee9a28276abf7d265b1bc49e6913a071a5f4f1892c7ffbe",
    ("noise", torch.float32): "cb656ee99e506935bc9924cbaa4d9e2c4cf84b83341db9fea925777f7edec6d0",
    ("noise", torch.float64): "077eb5fc17f5712d01934580a0e16e5607aaa4ee368843ea1f36b1f5c22331c1",
    ("default noise", torch.bfloat16): "48c6a8a49d1b92a10bcd777ef444657af2343448287ce444109cd5251a7c1fa2",
    ("default noise", torch.float32): "376e668b0dccbb039126e1349ac410bde8072882a40218c01f60fb4f207575e2",
    ("exact copies", torch.bfloat16): "52d1f7d90411a616106a9fa694223b54fe28d0761d333f5d08cde76a5ada568f",
    ("exact copies", torch.float32): "30ae711d6535dd0726634e2e22ca66af0e5f478caf2c83c4d12cea2c881bb16d",
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
    expand(plan, tmp_path / "grown", max_shard_bytes=10**9)
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
