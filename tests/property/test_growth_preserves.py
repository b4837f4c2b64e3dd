"""The heart of the matter: a grown checkpoint is the same function, and its parts are the source, bit for bit."""

import json
from math import fsum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdagrow.archs.motif import Motif
from gdagrow.models.gda import load_model
from tests.checkpoints import listing, write_checkpoint
from tests.growths import EPS, RANDOM, Grown, grow, growths, reads_last_dim, recorded_maps, topologies
from tests.reference import reference_logits

# Rounding in float64 (2.2e-16) over a few hundred dependent operations in three layers, amplified by norms of small
# activations: 45000 times eps.
TOLERANCE = 1e-11


def logits_agree(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def check_same_function(grown: Grown) -> None:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(grown.plan.before.vocab, (2, 5), generator=generator)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (grown.source, grown.target)]
    with torch.no_grad():
        models = [load_model(d, dtype=torch.float64)(ids).logits for d in (grown.source, grown.target)]
        loops = [reference_logits(t, c, ids) for t, c in zip((grown.before, grown.after), configs, strict=True)]
    assert bool(loops[0].isfinite().all())
    assert float(loops[0].std()) > 0.01 * float(loops[0].abs().max()), "logits that say nothing"
    assert logits_agree(models[1], models[0])
    assert logits_agree(loops[1], loops[0])
    assert logits_agree(models[1], loops[0])


def folded(parts: Tensor, new_to_old: list[int], num_old: int) -> Tensor:
    """Sum the columns of `[rows, new]` that are copies of one old column, with no rounding, to float64 `[rows, old]`.

    Float64 holds every partial sum of parts of the smaller dtypes: they are multiples of 1/8 unit of the weight, at
    most 7 bits beyond its 24. For float64 itself `fsum` rounds the exact sum once, and what is checked is that the
    remainder of that is zero too.
    """
    result = torch.zeros((len(parts), num_old), dtype=torch.float64)
    if parts.dtype != torch.float64:
        return result.index_add_(1, torch.tensor(new_to_old), parts.double())
    groups: list[list[int]] = [[] for _ in range(num_old)]
    for new, old in enumerate(new_to_old):
        groups[old].append(new)
    for row, values in enumerate(parts.tolist()):
        for old, news in enumerate(groups):
            total = fsum(values[new] for new in news)
            # The exact sum is `total` only if nothing is left when that is taken off.
            result[row, old] = total if fsum([*(values[new] for new in news), -total]) == 0.0 else torch.nan
    return result


def check_parts_sum_to_the_source(grown: Grown) -> None:
    record = json.loads((grown.target / "growth.json").read_text())
    source_config = json.loads((grown.source / "config.json").read_text())
    assert grown.after.keys() == {tensor.name for tensor in grown.plan.tensors}
    for tensor in grown.plan.tensors:
        before, after = grown.before[tensor.source.name], grown.after[tensor.name]
        maps = recorded_maps(record, source_config, tensor.name)
        assert [list(dim) for dim in tensor.growth.dims] == list(maps), tensor.name
        assert after.dtype == before.dtype, tensor.name
        assert after.shape == tensor.shape == tuple(map(len, maps)), tensor.name
        if len(maps) == 2:
            before = before[maps[0]]
        if reads_last_dim(tensor.name, tied=grown.plan.tied_after):
            sums = folded(after.reshape(-1, after.shape[-1]), list(maps[-1]), before.shape[-1])
            assert torch.equal(sums.reshape(before.shape), before.double()), tensor.name
        else:
            assert torch.equal(after, before[..., maps[-1]]), tensor.name


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    topology = draw(topologies())
    return topology, draw(growths(topology))


@settings(RANDOM, max_examples=150)
@given(cases())
def test_growth_preserves_the_function_and_every_weight(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    topology, recipe = case
    with TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "grown")
        write_checkpoint(source, **topology)
        untouched = listing(source)
        grown = grow(source, target, recipe)
        event(f"stored as {topology['dtype']}")
        event("exact copies" if recipe["exact_copies"] else "noise")
        assert listing(source) == untouched
        check_parts_sum_to_the_source(grown)
        check_same_function(grown)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [3, 5, 6, 7])
def test_factors_that_are_no_powers_of_two(tmp_path: Path, dtype: torch.dtype, factor: int) -> None:
    """Where rounding would lose the function: 1% of the logits in bf16 (growth-math 3.6)."""
    write_checkpoint(
        tmp_path / "source", dtype=dtype, groups=1, ratio=2, head_dim=4, hidden=6, ffn=10, tied=True, extra=EPS
    )
    grown = grow(tmp_path / "source", tmp_path / "grown", {"uniform": factor})
    check_parts_sum_to_the_source(grown)
    check_same_function(grown)


# Halving is exact in these for weights of this size. In float16 some are subnormal, and which copy gets the odd unit
# differs between one split by four and two by two.
HALVED_EXACTLY = (torch.bfloat16, torch.float32, torch.float64)

# Every copy serves whole shares: noise copies whole sets of signal heads, KV copies whole sets of noise heads.
HEAD_FACTORS = [(s, n, k) for s in (1, 2, 4) for n in (1, 2, 4) for k in (1, 2, 4) if s % n == 0 and n % k == 0]


@st.composite
def steps(draw: st.DrawFn) -> dict[str, int]:
    signal, noise, kv = draw(st.sampled_from(HEAD_FACTORS))
    at_least = 2 if signal == 1 else 1
    return {"signal": signal, "noise": noise, "kv": kv, "hidden": draw(st.sampled_from([1, 2, 4])),
            "ffn": draw(st.sampled_from([at_least, 4]))}  # fmt: skip


@settings(RANDOM, max_examples=25)
@given(topologies(HALVED_EXACTLY), steps(), steps())
def test_growing_twice_is_growing_once(topology: dict[str, Any], first: dict[str, int], second: dict[str, int]) -> None:
    """Powers of two and exact copies: not a byte of the weights differs."""
    once = {axis: first[axis] * second[axis] for axis in first}
    with TemporaryDirectory() as name:
        directory = Path(name)
        write_checkpoint(directory / "source", **topology)
        grow(directory / "source", directory / "half", first | {"exact_copies": True})
        twice = grow(directory / "half", directory / "twice", second | {"exact_copies": True}).target
        at_once = grow(directory / "source", directory / "once", once | {"exact_copies": True}).target
        assert (twice / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()
        configs = [json.loads((target / "config.json").read_text()) for target in (twice, at_once)]
        assert Motif().sizes(configs[0]) == Motif().sizes(configs[1])
        # The first step may have had to write out what the plain config leaves to its defaults.
        explicit = {"num_noise_heads", "head_dim"} & set(configs[0])
        assert {**configs[0], **dict.fromkeys(explicit)} == {**configs[1], **dict.fromkeys(explicit)}
        history = json.loads((twice / "growth.json").read_text())["history"]
        assert [step["factors"] for step in history] == [first]
