"""Recipes: the files that ship, the traps of YAML, labels, the round trip, and the text of every refusal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gdagrow.errors import RecipeError
from gdagrow.heads import Ratio
from gdagrow.recipe import make_recipe, parse_ratio, read_recipe
from tests.growths import RANDOM

RECIPES = Path(__file__).parents[2] / "recipes"

SHIPPED: dict[str, dict[str, Any]] = {
    "signal-x2": {"signal": 2},
    "uniform-x2": {"uniform": 2},
    "ratio-4to1": {"signal": "4:1"},
    "motif-2.6b-to-12.7b": {
        "signal": 4, "hidden": 2, "ffn": 2, "embeddings": "untie", "depth": 8, "rope_theta": 1000000,
        "max_position_embeddings": 32768,
    },
}  # fmt: skip
WHOLE = "expected a whole number from 1 to 512, got"
SIZE = "expected a whole number from 1 to 2147483647, got"
RATIO = "expected a target ratio R:1 with a whole R of 1 or more, such as 4:1, got"
NO_GROWTH = "no growth asked for; give at least one factor above 1, such as --signal-x2 or signal: 2"


def test_every_shipped_recipe_is_known_here() -> None:
    growth_recipes = {path.stem for path in RECIPES.glob("*.yaml")}
    assert growth_recipes == set(SHIPPED), "add the new recipe's fields to SHIPPED"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name: str) -> None:
    values = read_recipe(RECIPES / f"{name}.yaml")
    assert values == SHIPPED[name]
    assert make_recipe(values).as_dict() == SHIPPED[name]


def test_factors() -> None:
    recipe = make_recipe({"signal": "4:1", "hidden": "2"})
    assert [recipe.factor(axis) for axis in ("signal", "noise", "kv", "hidden", "ffn")] == [Ratio(4), 1, 1, 2, 1]
    uniform = make_recipe({"uniform": 3})
    assert [uniform.factor(axis) for axis in ("signal", "noise", "kv", "hidden", "ffn")] == [3] * 5
    assert (recipe.snr_db, recipe.seed, recipe.exact_copies, recipe.embeddings) == (40.0, 0, False, None)


def test_a_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe({"signal": 2}).signal = 3


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"signal": 2}, "signal-x2"),
        ({"signal": "4:1"}, "ratio-4to1"),
        ({"signal": "4:1", "hidden": 2, "kv": 3}, "ratio-4to1-kv-x3-hidden-x2"),
        ({"ffn": 2, "noise": 2, "signal": 1}, "noise-x2-ffn-x2"),
        ({"uniform": 2}, "uniform-x2"),
        ({"uniform": 2, "embeddings": "untie"}, "uniform-x2-untied"),
        ({"embeddings": "untie"}, "untied"),
        ({"hidden": 2, "embeddings": "keep"}, "hidden-x2"),
        ({"to": "motif"}, "to-motif"),
        ({"to": "motif", "uniform": 2, "embeddings": "untie"}, "to-motif-uniform-x2-untied"),
        (
            SHIPPED["motif-2.6b-to-12.7b"],
            "signal-x4-hidden-x2-ffn-x2-depth-plus-8-theta-1000000-context-32768-untied",
        ),
        ({"insert": "after:1,3"}, "depth-plus-2-after-1-3"),
        ({"layers": 6, "insert": "top"}, "layers-6-top"),
        ({"depth": 2, "insert": "even"}, "depth-plus-2"),
        ({"signal": "4:1", "select": "norm"}, "ratio-4to1-by-norm"),
        ({"signal": "4:1", "select": "given:heads.yaml"}, "ratio-4to1-given"),
    ],
)
def test_labels(values: dict[str, Any], label: str) -> None:
    assert make_recipe(values).label == label


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    factors = st.integers(2, 512)
    some = {axis: factors for axis in ("noise", "kv", "hidden", "ffn")}
    values: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=some))
    values["signal"] = draw(factors | st.integers(1, 512).map(lambda ratio: f"{ratio}:1"))
    if isinstance(values["signal"], str):
        values |= draw(st.sampled_from([{}, {"select": "first"}, {"select": "given:a.yaml"}]))
    values |= {f"{axis}_to": draw(st.integers(1, 2**31 - 1)) for axis in ("hidden", "ffn") if axis not in values}
    values |= draw(st.sampled_from([{}, {"depth": 3}, {"layers": 9, "insert": "top"}, {"insert": "after:0,0,7"}]))
    return values | draw(st.fixed_dictionaries({}, optional={
        "to": st.just("motif"), "embeddings": st.sampled_from(["keep", "untie"]), "exact_copies": st.booleans(),
        "rope_theta": st.floats(1, 1e9), "max_position_embeddings": st.integers(1, 10**6),
        "snr_db": st.floats(20, 120), "seed": st.integers(0, 2**64 - 1),
    }))  # fmt: skip


@settings(RANDOM)
@given(recipes())
def test_as_dict_reads_back(values: dict[str, Any]) -> None:
    recipe = make_recipe(values)
    assert recipe.as_dict() == values
    assert list(recipe.as_dict()) == sorted(values)
    assert make_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, NO_GROWTH),
        ({"signal": 1, "hidden": 1}, NO_GROWTH),
        ({"embeddings": "keep"}, NO_GROWTH),
        ({"signal": 0}, f"signal: {WHOLE} 0"),
        ({"noise": -2}, f"noise: {WHOLE} -2"),
        ({"noise": "-2"}, f"noise: {WHOLE} -2"),
        ({"kv": 2.0}, f"kv: {WHOLE} 2.0"),
        ({"hidden": 2.5}, f"hidden: {WHOLE} 2.5"),
        ({"ffn": True}, f"ffn: {WHOLE} True"),
        ({"ffn": None}, f"ffn: {WHOLE} None"),
        ({"uniform": "two"}, f"uniform: {WHOLE} 'two'"),
        ({"uniform": "4:1"}, f"uniform: {WHOLE} '4:1'"),
        ({"signal": 513}, f"signal: {WHOLE} 513"),
        ({"signal": "\u0662"}, f"signal: {WHOLE} '\u0662'"),
        ({"signal": [2]}, f"signal: {WHOLE} [2]"),
        ({"signal": "4:2"}, f"signal: {RATIO} '4:2'"),
        ({"signal": "0:1"}, f"signal: {RATIO} '0:1'"),
        ({"signal": "4.5:1"}, f"signal: {RATIO} '4.5:1'"),
        ({"signal": "513:1"}, "signal: expected a target ratio of at most 512:1, got '513:1'"),
        ({"signal": "999999999999:1"}, f"signal: {RATIO} '999999999999:1'"),
        (
            {"uniform": 2, "signal": 2, "ffn": 3},
            "uniform grows all five axes and stands alone; remove signal, ffn or uniform",
        ),
        (
            {"head_dim": 2, "signal": 2},
            "head_dim cannot grow: the softmax scale and the RoPE frequencies depend on it, so no rescaling of weights "
            "preserves the function; grow signal, noise, kv, hidden or ffn instead",
        ),
        (
            {"signals": 2, "signal": 2},
            "unknown key 'signals', expected one of signal, select, noise, kv, hidden, ffn, hidden_to, ffn_to, "
            "uniform, depth, layers, insert, like, rope_theta, max_position_embeddings, to, embeddings, exact_copies, "
            "snr_db, seed",
        ),
        (
            {"depth": "+0", "hidden_to": "99999999999", "ffn_to": 2**31, "max_position_embeddings": 1.5},
            f"hidden_to: {SIZE} '99999999999'; ffn_to: {SIZE} 2147483648; depth: {SIZE} 0; max_position_embeddings: "
            f"{SIZE} 1.5",
        ),
        ({"rope_theta": True}, "rope_theta: expected a number, got True"),
        ({"signal": 2, "seed": True}, "seed: expected a number, got True"),
        ({"signal": 2, "embeddings": "drop"}, "embeddings: input should be 'keep' or 'untie', got 'drop'"),
        ({"signal": 2, "snr_db": 19}, "snr_db: input should be greater than or equal to 20, got 19"),
        ({"signal": 2, "snr_db": 121}, "snr_db: input should be less than or equal to 120, got 121"),
        ({"signal": 2, "seed": -1}, "seed: input should be greater than or equal to 0, got -1"),
        ({"signal": 2, "seed": 2**64}, f"seed: input should be less than {2**64}, got {2**64}"),
        (
            {"signal": 2, "exact_copies": "maybe"},
            "exact_copies: input should be a valid boolean, unable to interpret input, got 'maybe'",
        ),
        ({"signal": 0, "hidden": "x"}, f"signal: {WHOLE} 0; hidden: {WHOLE} 'x'"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe(values, origin="recipe r.yaml")
    assert str(error.value) == f"recipe r.yaml: {message}"


def test_snr_that_is_not_a_number() -> None:
    with pytest.raises(RecipeError, match=r"snr_db: .*, got nan$"):
        make_recipe({"signal": 2, "snr_db": float("nan")})


def test_flags_are_named_in_place_of_the_file() -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe({"signal": 0, "hidden": 0}, origin="recipe r.yaml", flags={"signal": "--signal-x"})
    assert str(error.value) == f"--signal-x: {WHOLE} 0; recipe r.yaml: hidden: {WHOLE} 0"


def test_ratios() -> None:
    assert [parse_ratio(text) for text in ("4:1", "04:1", "512:1")] == [Ratio(4), Ratio(4), Ratio(512)]
    with pytest.raises(RecipeError) as error:
        parse_ratio("4")
    assert str(error.value) == f"{RATIO} '4'"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("signal: 4:1", {"signal": "4:1"}),  # 241 in YAML 1.1
        ("hidden: 010", {"hidden": 10}),  # 8 in YAML 1.1
        ("on: 2\nnoise: no", {"on": 2, "noise": "no"}),  # true and false in YAML 1.1
        ("signal: 2 # twice\n", {"signal": 2}),
    ],
)
def test_yaml_is_read_as_version_1_2(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml") == values


def test_yes_is_no_factor(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("hidden: yes")
    with pytest.raises(RecipeError) as error:
        make_recipe(read_recipe(tmp_path / "r.yaml"))
    assert str(error.value) == f"growth: hidden: {WHOLE} 'yes'"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "expected keys with values, such as 'signal: 2' for a growth, got NoneType"),
        (b"- signal", "expected keys with values, such as 'signal: 2' for a growth, got list"),
        (b"2: 3", "expected keys with values, such as 'signal: 2' for a growth, got dict"),
        (b"\xff\xfe\x00", "cannot be read: not UTF-8 text"),
        (b"signal: [", "not YAML: while parsing a flow node expected the node content, but found '<stream end>'"),
        (b"signal: 2\nsignal: 3\n", "not YAML: while constructing a mapping"),
        (b"!!python/object:os.system {}", "not YAML: could not determine a constructor for the tag"),
        (b"signal: 2\n---\nsignal: 3\n", "not YAML: expected a single document in the stream"),
        (b"[" * 2000, "not YAML: nested more than 100 levels deep"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert str(error.value).startswith(f"recipe {path}: {complaint}")


def test_a_duplicate_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("signal: 2\nhidden: 2\nsignal: 3\n")
    with pytest.raises(RecipeError, match='found duplicate key "signal" with value "3"'):
        read_recipe(tmp_path / "r.yaml")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(RecipeError) as error:
            read_recipe(path)
        assert str(error.value) == f"recipe {path}: cannot be read: {reason}"
