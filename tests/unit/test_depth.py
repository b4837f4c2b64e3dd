"""Where new blocks stand, what a placement is written as, and the layers that come of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.depth import EVEN, Layers, Placement, parse_placement, place_blocks
from gdagrow.errors import PlanError, RecipeError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from tests.checkpoints import write_checkpoint
from tests.diffllama import TOPOLOGIES, save_diffllama
from tests.growths import RANDOM, grow

TOP, BOTTOM = Placement("top"), Placement("bottom")


def after(*layers: int) -> Placement:
    return Placement("after", layers)


@pytest.mark.parametrize(
    ("layers", "more", "placement", "source", "new"),
    [
        (3, 2, TOP, (0, 1, 2, 2, 2), {3, 4}),
        (3, 2, BOTTOM, (0, 0, 0, 1, 2), {0, 1}),
        (3, 1, EVEN, (0, 1, 2, 2), {3}),
        (4, 2, EVEN, (0, 1, 1, 2, 3, 3), {2, 5}),
        (3, 2, EVEN, (0, 1, 1, 2, 2), {2, 4}),
        (3, 3, EVEN, (0, 0, 1, 1, 2, 2), {1, 3, 5}),
        (1, 3, EVEN, (0, 0, 0, 0), {1, 2, 3}),
        (2, 5, EVEN, (0, 0, 0, 1, 1, 1, 1), {1, 2, 4, 5, 6}),
        (1, 2, BOTTOM, (0, 0, 0), {0, 1}),
        (3, 3, after(0, 2, 2), (0, 0, 1, 2, 2, 2), {1, 4, 5}),
        (3, 1, after(0), (0, 0, 1, 2), {1}),
    ],
)
def test_where_new_blocks_stand(
    layers: int, more: int, placement: Placement, source: tuple[int, ...], new: set[int]
) -> None:
    assert place_blocks(layers, more, placement) == Layers(source, frozenset(new))


def test_llama_pro_puts_one_behind_every_fourth_of_motif() -> None:
    """8 more than the 32 layers of Motif-2.6B."""
    found = place_blocks(32, 8, EVEN)
    assert sorted(found.new) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert len(found.moved) == 28


@settings(RANDOM, max_examples=300)
@given(st.integers(1, 40), st.integers(1, 90), st.data())
def test_old_layers_keep_their_order_and_new_ones_copy_a_neighbour(
    num_layers: int, more: int, data: st.DataObject
) -> None:
    behind = st.lists(st.integers(0, num_layers - 1), min_size=more, max_size=more).map(sorted).map(tuple)
    placement = data.draw(st.one_of(st.sampled_from([TOP, BOTTOM, EVEN]), behind.map(lambda layers: after(*layers))))
    found = place_blocks(num_layers, more, placement)
    assert len(found.source) == num_layers + more
    assert len(found.new) == more
    assert [found.source[i] for i in range(num_layers + more) if i not in found.new] == list(range(num_layers))
    for layer in found.new:
        neighbour = max(found.new) + 1 if placement == BOTTOM else layer - 1
        assert found.source[layer] == found.source[neighbour]
    first = min(found.new)
    assert found.moved == frozenset(i for i in range(len(found.source)) if i not in found.new and i > first)
    counts = [found.source.count(layer) - 1 for layer in range(num_layers)]
    if placement == TOP:
        assert found.moved == frozenset()
    elif placement == EVEN:
        # Of any run of layers, as many as its share.
        assert max(counts) - min(counts) <= 1
        for stop in range(num_layers + 1):
            assert abs(sum(counts[:stop]) - stop * more / num_layers) < 1
    elif placement.where == "after":
        assert placement.layers == tuple(layer for layer in range(num_layers) for _ in range(counts[layer]))


@pytest.mark.parametrize(
    ("text", "placement"),
    [("even", EVEN), ("top", TOP), ("bottom", BOTTOM), ("after:3", after(3)), ("after:7, 3,3", after(3, 3, 7)),
     ("after:0,31", after(0, 31))],
)  # fmt: skip
def test_placements_are_read_and_written(text: str, placement: Placement) -> None:
    assert parse_placement(text) == placement
    assert parse_placement(str(placement)) == placement


@pytest.mark.parametrize("text", ["", "middle", "after", "after:", "after:-1", "after:1,,2", "after:1.5", "after:x",
                                  "after:9999999", "after:1,2,", "even:2", "Top", "after:3 7", "a f t e r:3",
                                  "after:1 2,3", "after:\u0663"])  # fmt: skip
def test_what_is_no_placement(text: str) -> None:
    with pytest.raises(RecipeError, match=r"expected even, top, bottom or after:3,7,11 \(layers of the source, from 0"):
        parse_placement(text)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"insert": "after:0,2,5"}, "insert after:0,2,5: the source has no layer 2, 5, expected 0 to 1"),
    ({"insert": "after:0,0", "depth": 3}, "insert after:0,0: it places 2 new blocks and 3 are asked for; name a layer"),
    ({"insert": "after:1", "layers": 4}, "insert after:1: it places 1 new blocks and 2 are asked for"),
    ({"layers": 1}, "layers 1: the source has 2, and growth never drops a layer; choose 2 or more"),
    ({"layers": 2}, "nothing would grow"),
]


@pytest.mark.parametrize(("recipe", "sentence"), REFUSED, ids=[str(recipe) for recipe, _ in REFUSED])
def test_what_cannot_be_placed(tmp_path: Path, recipe: dict[str, Any], sentence: str) -> None:
    write_checkpoint(tmp_path / "source")
    with pytest.raises(PlanError) as error:
        make_plan(read_header(tmp_path / "source"), make_recipe(recipe))
    assert str(error.value).startswith(sentence)


def test_diffllama_cannot_move_a_layer(tmp_path: Path) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[2], dtype=torch.bfloat16)
    header = read_header(tmp_path / "source")
    with pytest.raises(PlanError) as error:
        make_plan(header, make_recipe({"insert": "after:0"}))
    assert str(error.value) == (
        "layer 1 would become layer 2, whose lambda_init is another, and the diffllama layout has no weight in its "
        "sub-norm that could take that up; convert the checkpoint as well with --to motif (to: motif in a recipe), or "
        "put new blocks at the top (--insert top)"
    )
    assert make_plan(header, make_recipe({"insert": "top", "depth": 1})).layers.moved == frozenset()
    assert make_plan(header, make_recipe({"insert": "after:0", "to": "motif"})).layers.moved == {2, 3}


EXACT = {"exact_copies": True}


@pytest.mark.parametrize(
    ("first", "second", "once"),
    [
        ({"depth": 1, "insert": "top"}, {"depth": 1, "insert": "top"}, {"depth": 2, "insert": "top"}),
        ({"depth": 2, "insert": "top"}, {"hidden": 2, "signal": 4}, {"depth": 2, "insert": "top", "hidden": 2,
                                                                     "signal": 4}),
        ({"uniform": 2}, {"depth": 1, "insert": "top"}, {"uniform": 2, "depth": 1, "insert": "top"}),
        # One move is a repair and none is: it does not matter when the second growth comes.
        ({"depth": 1, "insert": "bottom"}, {"ffn": 2}, {"depth": 1, "insert": "bottom", "ffn": 2}),
        ({"signal": 2, "kv": 2, "noise": 2}, {"insert": "after:0,1"}, {"signal": 2, "kv": 2, "noise": 2,
                                                                       "insert": "after:0,1"}),
    ],
    ids=str,
)  # fmt: skip
def test_growing_twice_is_growing_once(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], once: dict[str, Any]
) -> None:
    """Exact copies by powers of two: not a byte of the weights differs."""
    write_checkpoint(tmp_path / "source", tied=True, bias=True, lambda_dtype=torch.float32)
    grow(tmp_path / "source", tmp_path / "half", first | EXACT)
    twice = grow(tmp_path / "half", tmp_path / "twice", second | EXACT).target
    at_once = grow(tmp_path / "source", tmp_path / "once", once | EXACT).target
    assert (twice / "config.json").read_bytes() == (at_once / "config.json").read_bytes()
    assert (twice / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()


def test_moving_twice_is_moving_once_but_for_rounding(tmp_path: Path) -> None:
    """Each move rounds the gains once; the vectors that take up the rest are then others with the same product."""
    write_checkpoint(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "half", {"depth": 1, "insert": "bottom"})
    twice = grow(tmp_path / "half", tmp_path / "twice", {"depth": 1, "insert": "bottom"}).after
    once = grow(tmp_path / "source", tmp_path / "once", {"depth": 2, "insert": "bottom"}).after
    eps = torch.finfo(torch.float64).eps
    for layer in (2, 3):
        name = f"model.layers.{layer}.self_attn."
        # Two factors and two products, each rounded once.
        assert torch.allclose(twice[name + "subln.weight"], once[name + "subln.weight"], rtol=4 * eps, atol=0)
        both = [grown[name + "lambda_q2"] @ grown[name + "lambda_k2"] for grown in (twice, once)]
        lengths = float(once[name + "lambda_q2"].norm() * once[name + "lambda_k2"].norm())
        # Rounded once for each of 8 products, and for each of the two vectors and moves.
        assert abs(float(both[0] - both[1])) <= 8 * 4 * eps * lengths
    kept = [name for name in once if not name.endswith(("subln.weight", "lambda_q2", "lambda_k2"))]
    assert all(torch.equal(twice[name], once[name]) for name in kept)
