"""Weights that come from none: how they are drawn, what is zero or a mean, and that nothing depends on chunks."""

from itertools import pairwise
from math import inf, nan, sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import gdagrow.growth
import gdagrow.streaming
from gdagrow.axes import AxisMaps, IndexMap, parse
from gdagrow.engine import grow_moment, grow_rows, grow_tensor
from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.fresh import Fresh, fill_rows
from gdagrow.growth import TensorGrowth
from gdagrow.output import weights_output
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.reading import open_reader
from gdagrow.recipe import make_recipe
from gdagrow.split import Noise
from tests.checkpoints import write_checkpoint
from tests.growths import RANDOM

FRESH = Fresh(0.02, seed=3)
HIDDEN, FFN = IndexMap.extended(5, 13), IndexMap.extended(4, 11)  # 2 copies and 3 fresh ones, of either
MAPS = AxisMaps({"hidden": HIDDEN, "ffn": FFN, "vocab": IndexMap.identity(6)})


def growth_of(notation: str, *, is_gain: bool = False) -> TensorGrowth:
    return TensorGrowth.of(parse(notation), MAPS, is_gain=is_gain)


def grown(growth: TensorGrowth, dtype: torch.dtype = torch.float64, fresh: Fresh = FRESH) -> Tensor:
    source = torch.randn([dim.old_size for dim in growth.dims], generator=torch.Generator().manual_seed(0)).to(dtype)
    return grow_tensor(growth, source, "name", Noise(40.0, 1), fresh)


FREE = slice(None)


@pytest.mark.parametrize(
    ("notation", "zero", "free"),
    [
        # The residual stream: what writes to a fresh feature is zero, what reads it is free.
        ("vocab -> hidden", [(FREE, slice(10, 13))], []),
        ("hidden <-", [(slice(10, 13),)], []),
        ("vocab <- hidden", [], [(FREE, slice(10, 13))]),
        # The FFN: what reads a fresh unit is zero, its two writers are free.
        ("ffn <- hidden", [], [(slice(8, 11), FREE), (FREE, slice(10, 13))]),
        ("ffn <-", [(slice(8, 11),)], []),
        ("hidden <- ffn", [(slice(10, 13), FREE), (FREE, slice(8, 11))], []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_zero_and_what_is_free(
    notation: str, zero: list[tuple[slice, ...]], free: list[tuple[slice, ...]], dtype: torch.dtype
) -> None:
    found = grown(growth_of(notation), dtype)
    for at in zero:
        assert int(found[at].count_nonzero()) == 0
    for at in free:
        assert int(found[at].count_nonzero()) == found[at].numel()
        assert float(found[at].abs().max()) <= sqrt(3) * 0.02 * (1 + torch.finfo(dtype).eps)
    # All else is what it would be without them.
    dims = tuple(dim if not dim.num_fresh else IndexMap.tile(dim.old_size, 2) for dim in growth_of(notation).dims)
    alone = grown(TensorGrowth(dims, growth_of(notation).reads), dtype)
    assert torch.equal(found[tuple(slice(dim.size) for dim in dims)], alone)


@pytest.mark.parametrize("notation", ["hidden <-", "<- hidden"], ids=["a gain", "a gain that carries the split"])
def test_a_fresh_gain_is_the_mean_of_the_others(notation: str) -> None:
    growth, source = growth_of(notation, is_gain=True), torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0], dtype=torch.float64)
    assert grow_tensor(growth, source, "name", None, FRESH)[10:].tolist() == [3.2] * 3


def test_the_mean_of_gains_is_rounded_once_so_that_all_machines_make_it_alike() -> None:
    growth = growth_of("hidden <-", is_gain=True)
    for gains, mean in (([2.0**53, 1.0, 1.0, -(2.0**53), 8.0], 2.0), ([1e16, 1.0, -1e16, 1.0, 0.5], 0.5)):
        assert grow_tensor(growth, torch.tensor(gains, dtype=torch.float64), "name", None, FRESH)[10:].tolist() == (
            [mean] * 3
        )
    for broken in ([inf, -inf, 1.0, 1.0, 1.0], [1e308] * 5, [nan] * 5):
        found = grow_tensor(growth, torch.tensor(broken, dtype=torch.float64), "name", None, FRESH)[10:]
        assert not bool(found.isfinite().any())


def test_free_weights_have_the_deviation_and_no_mean() -> None:
    maps = AxisMaps({"a": IndexMap.identity(400), "b": IndexMap.extended(1000, 1999)})
    growth = TensorGrowth.of(parse("a <- b"), maps)
    drawn = grow_tensor(growth, torch.zeros(400, 1000, dtype=torch.float64), "name", None, Fresh(0.3, 7))[:, 1000:]
    num = drawn.numel()
    # Five standard errors: of a mean, s / sqrt(n); of a mean square of uniform numbers, sqrt(4 / 5) s^2 / sqrt(n).
    assert abs(float(drawn.mean())) < 5 * 0.3 / sqrt(num)
    assert abs(float(drawn.square().mean()) - 0.09) < 5 * 0.09 * sqrt(0.8 / num)
    assert 0.999 * sqrt(3) * 0.3 < float(drawn.abs().max()) <= sqrt(3) * 0.3
    # Of rows, of columns and of both halves, no two are alike: no words are drawn twice.
    assert len({tuple(row) for row in drawn.tolist()}) == 400
    assert len({tuple(column) for column in drawn.T.tolist()}) == 999


def test_they_depend_on_seed_name_and_place_alone() -> None:
    growth = growth_of("ffn <- hidden")
    first = grown(growth)
    assert torch.equal(grown(growth), first)
    assert not torch.equal(grown(growth, fresh=Fresh(0.02, 4))[8:], first[8:])
    source = torch.zeros(4, 5, dtype=torch.float64)
    assert torch.equal(grow_tensor(growth, source, "name", None, FRESH)[8:], first[8:]), "not on the source"
    assert not torch.equal(grow_tensor(growth, source, "other", None, FRESH)[8:], first[8:])
    # Whole rows and the fresh columns of others do not share words.
    assert not set(first[8:].flatten().tolist()) & set(first[:8, 10:].flatten().tolist())


@settings(RANDOM, max_examples=100)
@given(st.data())
def test_rows_do_not_depend_on_how_they_come(data: st.DataObject) -> None:
    """In pieces of any size and order, of blocks of one row or of several."""
    rows, new_rows = data.draw(st.integers(3, 9)), data.draw(st.integers(10, 30))
    columns = data.draw(st.integers(2, 5))
    maps = AxisMaps({
        "ffn": IndexMap.extended(rows, new_rows), "hidden": IndexMap.extended(columns, data.draw(st.integers(5, 17))),
    })  # fmt: skip
    growth = TensorGrowth.of(parse("ffn <- hidden"), maps)
    source = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    noise = Noise(30.0, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdagrow.growth, "BLOCK_WEIGHTS", data.draw(st.integers(1, 30)))
        whole = grow_tensor(growth, source, "name", noise, FRESH)
        pieces = torch.full_like(whole, torch.nan)
        for segment in growth.rows.segments:
            inside = st.sets(st.integers(segment.old + 1, segment.old + segment.length))
            cuts = sorted({segment.old, segment.old + segment.length} | data.draw(inside))
            for start, stop in data.draw(st.permutations(list(pairwise(cuts)))):
                to = pieces[segment.new + start - segment.old : segment.new + stop - segment.old]
                if segment.fresh:
                    fill_rows(growth, to, first_row=start, name="name", fresh=FRESH)
                else:
                    part = source[start:stop]
                    grow_rows(growth, part, to, first_row=start, name="name", noise=noise, fresh=FRESH)
        assert torch.equal(pieces, whole)


def in_memory(plan: GrowthPlan) -> dict[str, Tensor]:
    """Every tensor grown at once, from the tensors of the plan's view."""
    recipe = plan.recipe
    fresh, noise = Fresh(plan.deviation, recipe.seed), Noise(recipe.snr_db, recipe.seed)
    with open_reader(plan.header) as reader:
        return {
            tensor.name: grow_tensor(
                tensor.growth, reader.tensor(tensor.source.name), tensor.name,
                noise if tensor.noisy or tensor.parted else None, fresh, parted=tensor.parted,
            )
            for tensor in plan.tensors
        }  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "poly_norm"])
def test_streamed_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    """Through real files, by chunks of a row and larger ones, few of them in memory and more: not a byte differs."""
    write_checkpoint(tmp_path / "source", activation=activation, bias=True, layers=2, lambda_dtype=torch.float32)
    recipe = {"hidden_to": 75, "insert": "after:0", "signal": "4:1", "select": "norm", "snr_db": 30.0, "seed": 9}
    if activation == "silu":
        recipe["ffn_to"] = 130
    monkeypatch.setattr(gdagrow.growth, "BLOCK_WEIGHTS", 70)
    plan = make_plan(read_header(tmp_path / "source"), make_recipe(recipe))
    expected, files = in_memory(plan), set()
    for chunk_bytes, kept in ((1, 1), (3_000, 3), (10**7, 2)):
        monkeypatch.setattr(gdagrow.streaming, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(gdagrow.streaming, "KEPT_CHUNKS", kept)
        monkeypatch.setattr(gdagrow.streaming, "NUM_CHUNKS", kept + 1)
        target = tmp_path / f"{chunk_bytes}"
        expand(plan, target, weights_output(plan, 10**9))
        files.add((target / "model.safetensors").read_bytes())
        found = load_file(target / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    assert len(files) == 1


def test_the_deviation_is_that_of_the_config(tmp_path: Path) -> None:
    for found, expected in ((0.05, 0.05), (None, 0.02), (0, 0.02), ("0.5", 0.02), (7.0, 0.02)):
        write_checkpoint(tmp_path / str(found), extra={"initializer_range": found})
        assert make_plan(read_header(tmp_path / str(found)), make_recipe({"hidden_to": 40})).deviation == expected


def test_moments_of_what_is_fresh_begin_at_zero() -> None:
    """And those of copies are what they would be without."""
    growth = growth_of("ffn <- hidden")
    source = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for power in (1, 2):
        found = grow_moment(growth, source, power)
        assert int(found[8:].count_nonzero()) == int(found[:, 10:].count_nonzero()) == 0
        assert torch.equal(found[:8, :10], source.repeat(2, 2) / 2**power)
