"""The engine against a plain gather and division, and what may not change the bytes: chunks, threads, order."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdagrow.growth
import gdagrow.streaming
from gdagrow.axes import AxisMaps, IndexMap, parse
from gdagrow.engine import grow_moment, grow_rows, grow_tensor
from gdagrow.expand import expand
from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.fresh import Fresh
from gdagrow.growth import TensorGrowth, block_rows
from gdagrow.output import GrownTensor, weights_output
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from gdagrow.split import Noise
from gdagrow.streaming import Grower
from tests.checkpoints import write_checkpoint
from tests.growths import RANDOM

NOTATIONS = ["a <- b", "a -> b", "(a 2) <- (b 3)", "((a + 1) 2) <- b", "(a b) <-", "<- a", "b", "a <- (a b)"]


@st.composite
def complete_maps(draw: st.DrawFn, old_size: int) -> IndexMap:
    """Every old index at least once, some more often, in any order."""
    extra = draw(st.lists(st.integers(0, old_size - 1), max_size=6))
    return IndexMap.of(draw(st.permutations([*range(old_size), *extra])), old_size)


@st.composite
def growths(draw: st.DrawFn) -> TensorGrowth:
    maps = AxisMaps({axis: draw(st.integers(1, 4).flatmap(complete_maps)) for axis in "ab"})
    return TensorGrowth.of(parse(draw(st.sampled_from(NOTATIONS))), maps)


def copies_of(index_map: IndexMap) -> Tensor:
    old = list(index_map)
    return torch.tensor([old.count(i) for i in old], dtype=torch.float64)


def gathered_and_divided(growth: TensorGrowth, source: Tensor, divide: list[bool], power: int = 1) -> Tensor:
    """The rule written plainly: index_select along every dimension, then one division for each that is asked for."""
    result = source.double()
    for dim, index_map in enumerate(growth.dims):
        result = result.index_select(dim, torch.tensor(list(index_map)))
    for dim, index_map in enumerate(growth.dims):
        if divide[dim]:
            shape = [-1 if d == dim else 1 for d in range(result.dim())]
            result = result / copies_of(index_map).reshape(shape) ** power
    return result


@settings(RANDOM, max_examples=200)
@given(growths(), st.integers(0, 1000))
def test_growing_is_gathering_and_dividing_what_is_read(growth: TensorGrowth, seed: int) -> None:
    # Only the last dimension is read with copies in any table; "a -> b" reads its rows.
    growth = TensorGrowth(growth.dims, tuple(r and d == len(growth.dims) - 1 for d, r in enumerate(growth.reads)))
    source = torch.randn(
        [dim.old_size for dim in growth.dims], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    grown = grow_tensor(growth, source)
    expected = gathered_and_divided(growth, source, list(growth.reads))
    assert grown.shape == growth.shape
    # An exact part is at most one unit of its grid away from the quotient: half an ulp of the weight, and the
    # quotient itself is rounded.
    assert torch.allclose(grown, expected, rtol=2 * torch.finfo(torch.float64).eps * max(growth.shape), atol=0)
    if not any(growth.reads):
        assert torch.equal(grown, expected)


@settings(RANDOM, max_examples=200)
@given(growths(), st.sampled_from([1, 2]), st.integers(0, 1000))
def test_moments_are_divided_by_the_copies_of_what_is_written(growth: TensorGrowth, power: int, seed: int) -> None:
    source = torch.randn(
        [dim.old_size for dim in growth.dims], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    grown = grow_moment(growth, source, power)
    expected = gathered_and_divided(growth, source, [not reads for reads in growth.reads], power)
    # One rounding for each division, in whatever order.
    assert torch.allclose(grown, expected, rtol=4 * torch.finfo(torch.float64).eps, atol=0)
    assert grown.shape == growth.shape


class Held:
    """A reader of tensors that are in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        return self._tensors[name][begin:end]


@settings(RANDOM, max_examples=60)
@given(st.lists(st.tuples(growths(), st.sampled_from([1, 2, None])), min_size=1, max_size=4), st.data())
def test_moments_do_not_depend_on_chunks(wanted: list[tuple[TensorGrowth, int | None]], data: st.DataObject) -> None:
    """Chunks of one row and of several, kept for further copies or grown anew, give the same bytes."""
    code = data.draw(st.sampled_from(["F32", "BF16", "F16"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    held, tensors, expected = {}, [], b""
    for number, (growth, power) in enumerate(wanted):
        name = str(number)
        shape = [dim.old_size for dim in growth.dims]
        held[name] = torch.randn(shape, dtype=torch.float32, generator=generator).to(DTYPES[code])
        files = None if power is None else "held"
        tensors.append(GrownTensor(name, files, name, code, growth, power=power or 1))
        grown = grow_moment(growth, held[name] if files else torch.zeros_like(held[name]), power or 1)
        expected += bytes(tensor_bytes(grown))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdagrow.growth, "BLOCK_WEIGHTS", 1)
        patch.setattr(gdagrow.streaming, "CHUNK_BYTES", data.draw(st.integers(1, 40)))
        kept = data.draw(st.integers(1, 3))
        patch.setattr(gdagrow.streaming, "KEPT_CHUNKS", kept)
        patch.setattr(gdagrow.streaming, "NUM_CHUNKS", kept + data.draw(st.integers(1, 3)))
        with Grower({"held": Held(held)}, None, Fresh(0.02, 0)) as grower:
            assert b"".join(bytes(chunk) for chunk in grower.chunks(tensors)) == expected


NOISE = Noise(snr_db=40.0, seed=3)


@settings(RANDOM, max_examples=40)
@given(st.data())
def test_rows_do_not_depend_on_how_they_come(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.float64]))
    columns = IndexMap.of(data.draw(st.permutations([*range(40), *range(10), *range(25)])), 40)
    # Two blocks of rows and a bit; wide columns would need fewer rows for that.
    columns = IndexMap(tuple((a * 1024, b * 1024) for a, b in columns.runs), 40 * 1024)
    growth = TensorGrowth((IndexMap.identity(8), columns), (False, True))
    assert block_rows(growth) == 3
    source = torch.randn(8, 40 * 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Subnormal and infinite weights are split another way than the rest, which may not show beside them.
    source[:, :: data.draw(st.integers(300, 9000))] *= torch.finfo(dtype).smallest_normal
    source[data.draw(st.integers(0, 7)), data.draw(st.integers(0, 40 * 1024 - 1))] = torch.inf
    whole = grow_tensor(growth, source, "name", NOISE)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 7)))), 8]
    pieces = torch.empty_like(whole)
    for start, stop in data.draw(st.permutations(list(pairwise(cuts)))):
        grow_rows(growth, source[start:stop], pieces[start:stop], first_row=start, name="name", noise=NOISE)
    assert torch.equal(pieces, whole)


def test_copies_of_rows_are_identical_with_noise() -> None:
    growth = TensorGrowth((IndexMap.of([0, 1, 2, 3, 2, 1], 4), IndexMap.tile(3, 2)), (False, True))
    grown = grow_tensor(growth, torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), "name", NOISE)
    assert torch.equal(grown[4], grown[2])
    assert torch.equal(grown[5], grown[1])
    assert not torch.equal(grown[:, :3], grown[:, 3:])


def test_noise_depends_on_seed_and_name_and_row() -> None:
    growth = TensorGrowth((IndexMap.identity(2), IndexMap.tile(50, 2)), (False, True))
    source = torch.ones(2, 50)
    grown = grow_tensor(growth, source, "name", NOISE)
    assert torch.equal(grow_tensor(growth, source, "name", Noise(40.0, 3)), grown)
    assert not torch.equal(grow_tensor(growth, source, "name", Noise(40.0, 4)), grown)
    assert not torch.equal(grow_tensor(growth, source, "other", NOISE), grown)
    assert not torch.equal(grown[0], grown[1])


def test_blocks_have_words_of_their_own() -> None:
    columns = IndexMap.tile(2**16, 2)
    growth = TensorGrowth((IndexMap.identity(4), columns), (False, True))
    assert block_rows(growth) == 2
    grown = grow_tensor(growth, torch.ones(4, 2**16), "name", NOISE)
    assert not torch.equal(grown[:2], grown[2:])


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("exact_copies", [False, True])
def test_neither_the_size_nor_the_number_of_chunks_changes_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_copies: bool
) -> None:
    # 6 blocks of rows in the embedding, and attention heads whose copies begin inside a block.
    write_checkpoint(tmp_path / "source", hidden=512, ffn=256, vocab=1500, layers=1, dtype=torch.bfloat16)
    recipe = make_recipe({"signal": "4:1", "hidden": 2, "ffn": 3, "exact_copies": exact_copies})
    plan = make_plan(read_header(tmp_path / "source"), recipe)
    assert max(t.growth.rows.old_size / block_rows(t.growth) for t in plan.tensors) > 5
    expand(plan, tmp_path / "usual", weights_output(plan, 10**9))
    usual = bytes_of(tmp_path / "usual")
    counted: list[int] = []
    for chunk_bytes, kept in ((1, 1), (1_200_000, 3), (10**7, 1)):
        monkeypatch.setattr(gdagrow.streaming, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(gdagrow.streaming, "KEPT_CHUNKS", kept)
        monkeypatch.setattr(gdagrow.streaming, "NUM_CHUNKS", kept + 1)
        chunks: list[int] = []
        target = tmp_path / f"{chunk_bytes}-{kept}"
        expand(plan, target, weights_output(plan, 10**9), progress=chunks.append)
        assert bytes_of(target) == usual
        assert sum(chunks) == plan.num_bytes
        counted.append(len(chunks))
    assert counted[0] > counted[1] > counted[2], "the chunk size had no effect"


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", layers=1)
    written = {}
    for name, seed in (("first", 5), ("second", 5), ("third", 6)):
        plan = make_plan(read_header(tmp_path / "source"), make_recipe({"hidden": 2, "seed": seed}))
        expand(plan, tmp_path / name, weights_output(plan, 10**9))
        written[name] = bytes_of(tmp_path / name)
    assert written["first"] == written["second"]
    assert written["first"]["model.safetensors"] != written["third"]["model.safetensors"]


@settings(RANDOM, max_examples=100)
@given(growths())
def test_row_runs_cover_the_grown_rows_in_order(growth: TensorGrowth) -> None:
    rows = [row for start, stop in growth.rows.runs for row in range(start, stop)]
    expected = list(growth.dims[0]) if len(growth.dims) == 2 else [0]
    assert rows == expected
    assert growth.splits == any(
        len(set(index_map)) < index_map.size and reads
        for index_map, reads in zip(growth.dims, growth.reads, strict=True)
    )
