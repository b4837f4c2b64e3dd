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
    ("noise", torch.bfloat16): "bb7d1371f64468dcb313da0e46206032be1e12a8ca0dd2ed49c88a67a5690941",
    ("noise", torch.float16): "df9f1ebbdcfb73a70521ebd62a2e78ed171aba6e3bd995c658ac331e0473b60b",
    ("noise", torch.float32): "4d7f0206bb53bf753da91614c9ef11b9e2387b512386f7f356ff6479f1b529fa",
    ("noise", torch.float64): "9a467cc465eb249b14f492d21450a5e6c9bafca5c3311370809cb2a9628d1bad",
    ("default noise", torch.bfloat16): "52518542095f3f1b93ce264eec70e58ad1f77c1b80ddd8062ab986c1b1fed71c",
    ("default noise", torch.float32): "822d8d252c9ff67c875461dba0cedf843af2dae4edb183e86c31377f4b82532c",
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
