"""The certificate holds for every right growth, whatever its dtype and factors, and its sums are exact."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from gdagrow.archs.motif import Motif
from gdagrow.axes import IndexMap, parse
from gdagrow.errors import CompareError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.safetensors_reader import TORCH_DTYPES
from gdagrow.growth import TensorGrowth
from gdagrow.verify.fold import FLOATS, fold_rows
from gdagrow.verify.lineage import inferred_maps
from gdagrow.verify.places import head_at
from gdagrow.verify.weights import check_weights
from tests.checkpoints import write_checkpoint
from tests.growths import RANDOM, STORED_DTYPES, grow, growths, topologies


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    topology = draw(topologies())
    return topology, draw(growths(topology))


@settings(RANDOM, max_examples=60)
@given(cases())
def test_every_growth_has_its_certificate(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    topology, recipe = case
    with TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "grown")
        write_checkpoint(source, **topology)
        grown = grow(source, target, recipe)
        seen: list[int] = []
        found = check_weights(source, target, progress=seen.append)
        assert found.equivalent, found
        assert (found.maps, found.num_tensors) == ("growth.json", len(grown.plan.tensors))
        assert found.num_elements == sum(tensor.num_elements for tensor in grown.plan.tensors)
        assert sum(seen) == read_header(target).num_bytes
        sizes = [Motif().sizes(read_header(path).config) for path in (source, target)]
        (target / "growth.json").unlink()
        if inferred_maps(*sizes) == grown.plan.maps:
            event("inferred")
            found = check_weights(source, target)
            assert (found.equivalent, found.maps) == (True, "config.json")


def test_growing_twice_folds_back_to_either_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", tied=True)
    grow(tmp_path / "a", tmp_path / "b", {"signal": 2, "hidden": 3})
    grow(tmp_path / "b", tmp_path / "c", {"signal": "7:1", "hidden": 2})
    for source in ("a", "b"):
        found = check_weights(tmp_path / source, tmp_path / "c")
        assert (found.equivalent, found.maps) == (True, "growth.json"), found
    grow(tmp_path / "b", tmp_path / "untied", {"signal": 2, "embeddings": "untie"})
    assert check_weights(tmp_path / "b", tmp_path / "untied").equivalent
    with pytest.raises(CompareError, match=r"untied in one of several growths, .* check each growth against its own"):
        check_weights(tmp_path / "a", tmp_path / "untied")


def sums(weight: list[float], parts: list[list[float]], dtype: torch.dtype) -> list[float]:
    """How far each sum of parts was found from its weight, in order; nothing for those that are equal."""
    growth = TensorGrowth((IndexMap.identity(1), IndexMap.tile(len(weight), len(parts))), (False, True))
    joined = [value for part in parts for value in part]
    rows = [torch.tensor([values], dtype=dtype).view(torch.uint8).numpy() for values in (weight, joined)]
    code = next(code for code, of_torch in TORCH_DTYPES.items() if of_torch == dtype)
    source, grown = (octets.view(FLOATS[code].bits) for octets in rows)
    return [float(d) for wrong in fold_rows(FLOATS[code], growth, source, grown) for d in wrong.apart]


@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_rounding_hides_no_wrong_sum(dtype: torch.dtype) -> None:
    """Parts that drown in others, or that drown others, in float64 as well."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 2
    assert sums([1.0], [[1.0], [tiny]], dtype) == [tiny]
    assert sums([0.0], [[huge], [tiny], [-huge]], dtype) == [tiny]
    assert sums([tiny], [[huge], [tiny], [-huge]], dtype) == []
    assert sums([0.0], [[huge], [-huge]], dtype) == []
    assert sums([huge], [[huge], [huge], [huge], [-huge], [-huge]], dtype) == []
    assert sums([0.0], [[huge], [huge], [huge], [-huge], [-huge], [-huge]], dtype) == []


@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_no_part_is_too_small_to_count(dtype: torch.dtype) -> None:
    """However far below its weight, and also when only the last bit of a sum that needs one more is wrong."""
    info = torch.finfo(dtype)
    part = info.smallest_normal
    while part < 1:
        assert sums([1.0], [[1.0], [part]], dtype) == [part]
        part *= 2
    ulp = info.eps / 4
    assert sums([1.0], [[0.75], [0.25 + ulp]], dtype) == [ulp]
    assert sums([1.0], [[0.75 - ulp * 2], [0.25 + ulp * 2]], dtype) == []


@pytest.mark.parametrize("copies", [2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_every_part_of_every_column_counts(dtype: torch.dtype, length: int, copies: int) -> None:
    weight = [copies / 8 * (column + 1) for column in range(length)]
    for column in range(length):
        for copy in range(copies):
            parts = [[(i + 1) / 8 for i in range(length)] for _ in range(copies)]
            assert sums(weight, parts, dtype) == []
            off = 2.0 ** (math.frexp(parts[copy][column])[1] - 1) * torch.finfo(dtype).eps  # the next number
            parts[copy][column] += off
            assert sums(weight, parts, dtype) == [off]


@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
def test_zeros_and_what_is_not_finite(dtype: torch.dtype) -> None:
    assert sums([0.0, -0.0, -0.0], [[-0.0, 0.0, -0.0], [0.0, 0.0, -0.0]], dtype) == []
    assert sums([math.inf, math.nan], [[math.inf, math.nan], [math.inf, math.nan]], dtype) == []
    for weight, parts in ((math.inf, (math.inf, 0.0)), (math.nan, (math.nan, 0.0)), (1.0, (math.inf, 0.0)),
                          (0.0, (math.inf, -math.inf)), (math.inf, (math.inf, -math.inf))):  # fmt: skip
        assert sums([weight], [[parts[0]], [parts[1]]], dtype) == [math.inf]


def test_heads_are_named_by_the_notation() -> None:
    sizes = {"group": 2, "signal": 3, "head_dim": 4, "kv": 2}
    rows = {row.name.rpartition("self_attn.")[2]: row.parsed.dims for row in Motif().table({"hidden_act": "silu"})}
    queries = [head_at(rows["q_proj.weight"][0], sizes, 4 * head) for head in range(8)]
    assert queries == [*(f"signal head {j} of group 0" for j in range(3)), "noise head of group 0",
                       *(f"signal head {j} of group 1" for j in range(3)), "noise head of group 1"]  # fmt: skip
    assert head_at(rows["o_proj.weight"][1], sizes, 8 * 5 - 1) == "signal head 1 of group 1"
    assert head_at(rows["k_proj.weight"][0], sizes, 15) == "KV group 1"
    assert head_at(rows["q_proj.weight"][1], sizes | {"hidden": 9}, 5) == ""
    (noise_first,) = parse("(group (1 + signal) head_dim)").dims
    assert head_at(noise_first, sizes, 4 * 4) == "noise head of group 1"
    assert head_at(noise_first, sizes, 4 * 5) == "signal head 0 of group 1"
