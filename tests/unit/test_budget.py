"""Growths to compare at a budget: the nearest of all that are considered, found by counting parameters by hand."""

from collections.abc import Iterator
from math import isclose
from typing import Any

import pytest
from hypothesis import given, settings

from gdagrow.archs import Parameter, architecture_of
from gdagrow.costs import checkpoint_figures, sized_figures
from gdagrow.errors import PlanError, RecipeError
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from gdagrow.rows import claim
from gdagrow.targets import TARGETS
from gdagrow.targets.budget import Arm, compare_arms, parse_budget
from gdagrow.train.configs import header_of_config
from tests.growths import RANDOM, header, topologies
from tests.unit.test_like import DIFFLLAMA, SMALL, config_of

# 4 groups of 1:1 on 2 KV groups.
PLAIN = SMALL | {"num_attention_heads": 8}


def counted(config: dict[str, Any], factors: tuple[int, ...], depth: int) -> tuple[int, int]:
    """Parameters and FLOPs a token of Motif's layout without biases, by hand, with SiLU and a head of its own."""
    signal, noise, kv, hidden, ffn = factors
    groups, dim = config["num_noise_heads"] * noise, config["head_dim"]
    signals = (config["num_attention_heads"] - config["num_noise_heads"]) * signal
    width, inner = config["hidden_size"] * hidden, config["intermediate_size"] * ffn
    keys = config["num_key_value_heads"] * kv * dim
    matrices = (signals + groups) * dim * width + 2 * keys * width + width * signals * 2 * dim + 3 * inner * width
    layers, head = config["num_hidden_layers"] + depth, config["vocab_size"] * width
    parameters = layers * (matrices + 4 * dim + 2 * dim + 2 * width) + 2 * head + width
    maps = layers * (signals + groups) * 2 * 3 * dim * 4096
    return parameters, 2 * (layers * matrices + head) + maps


def considered(config: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every group-differentiated growth that is considered, and every depth."""
    groups = config["num_noise_heads"]
    ratio = config["num_attention_heads"] // groups - 1
    served = groups // (config["num_key_value_heads"] // 2)
    sizes = range(1, 9)
    for noise in sizes:
        for signal in range(noise + 1, 5 * noise + 1):
            if ratio * signal % noise or ratio * signal // noise > 5:
                continue
            for kv in (k for k in sizes if served * noise % k == 0):
                for hidden in sizes:
                    for ffn in (f for f in sizes if hidden <= 2 * f and f <= 2 * hidden):
                        for depth in range(config["num_hidden_layers"] + 1):
                            yield (signal, noise, kv, hidden, ffn), depth


def factors_of(arm: Arm) -> tuple[tuple[int, ...], int]:
    recipe = arm.recipe
    assert recipe is not None
    return tuple(int(str(recipe.factor(axis))) for axis in ("signal", "noise", "kv", "hidden", "ffn")), (
        recipe.depth or 0
    )


@pytest.mark.parametrize("budget", [70_000, 1_234_567])
@pytest.mark.parametrize("config", [SMALL, PLAIN | {"num_key_value_heads": 8}], ids=["2to1", "1to1"])
def test_the_arms_are_the_nearest_of_all(config: dict[str, Any], budget: int) -> None:
    """Of equals those with the fewest new layers, and of those again the one with the smallest factors."""
    comparison = compare_arms(header(config), budget)
    arms = comparison.arms
    for name, arm in arms.items():
        parameters, flops = counted(config, *(factors_of(arm) if arm.recipe else ((1,) * 5, 0)))
        assert (arm.model.num_parameters, arm.model.flops_per_token) == (parameters, flops), name
        assert arm.model.training_state_bytes == 16 * parameters

    def apart(number: int, target: int) -> float:
        return max(number / target, target / number)

    uniform = [((m,) * 5, depth) for m in range(1, 9) for depth in range(5) if (m, depth) != (1, 0)]
    best = min((apart(counted(config, *growth)[0], budget), growth[1]) for growth in uniform)
    assert (apart(arms["uniform"].model.num_parameters, budget), factors_of(arms["uniform"])[1]) == best

    heads = arms["uniform"].model.sizes.heads.num_query_heads
    growths = [(growth, *counted(config, *growth)) for growth in considered(config)]
    noise_heads, all_heads = config["num_noise_heads"], config["num_attention_heads"]
    of_uniform = counted(config, *factors_of(arms["uniform"]))
    as_many_heads = [g for g in growths if noise_heads * g[0][0][1] + (all_heads - noise_heads) * g[0][0][0] == heads]
    for name, number, target, of_equals in (
        ("differentiated", 0, budget, growths),
        ("equal parameters", 0, of_uniform[0], growths),
        ("equal FLOPs", 1, of_uniform[1], growths),
        ("equal query heads", 0, of_uniform[0], as_many_heads),
    ):
        if not of_equals:
            assert name in comparison.missing
            continue
        *_, best = min((apart(found[1 + number], target), found[0][1], found[0]) for found in of_equals)
        assert factors_of(arms[name]) == best, name


@settings(RANDOM, max_examples=50)
@given(topologies())
def test_figures_from_sizes_are_those_of_the_tensors(topology: dict[str, Any]) -> None:
    config = config_of(topology)
    source = header(config)
    architecture = architecture_of(config)
    rows: dict[Parameter, str] = {}
    for name, row in claim(source, architecture, architecture.sizes(config)).items():
        rows[row] = source.tensors[name].dtype
    found = checkpoint_figures(source).as_dict()
    sized = sized_figures(rows, architecture.sizes(config), tied=topology["tied"]).as_dict()
    assert {**sized, "files": found["files"]} == found


def test_a_published_model() -> None:
    """Motif-2.6B at the size of Motif-2-12.7B."""
    source = header_of_config(TARGETS["motif-2.6b"])
    comparison = compare_arms(source, parse_budget("12.7B"))
    assert comparison.missing == {}
    assert factors_of(comparison.arms["uniform"]) == ((2, 2, 2, 2, 2), 12)
    for name, arm in comparison.arms.items():
        ratio = arm.model.sizes.heads.ratio
        assert ratio == 1 if name in ("source", "uniform") else 1 < ratio <= 5
    uniform, parameters, flops, heads = (comparison.arms[name].model for name in (
        "uniform", "equal parameters", "equal FLOPs", "equal query heads",
    ))  # fmt: skip
    assert isclose(uniform.num_parameters, 12.7e9, rel_tol=0.01)
    assert parameters.num_parameters == uniform.num_parameters
    assert flops.flops_per_token == uniform.flops_per_token
    assert factors_of(comparison.arms["equal query heads"]) == ((3, 1, 1, 2, 3), 1)
    assert heads.sizes.heads.num_query_heads == uniform.sizes.heads.num_query_heads == 32
    assert isclose(heads.num_parameters, uniform.num_parameters, rel_tol=0.01)


@pytest.mark.parametrize("budget", [70_000, 225_000])
def test_every_arm_is_a_growth_that_can_be_planned(budget: int) -> None:
    source = header(PLAIN)
    arms = compare_arms(source, budget).arms
    for arm in arms.values():
        if arm.recipe is not None:
            plan = make_plan(source, arm.recipe)
            assert plan.after == arm.model.sizes
            assert sum(tensor.num_elements for tensor in plan.tensors) == arm.model.num_parameters
    assert any(arm.recipe.depth for arm in arms.values() if arm.recipe)


def test_diffllama_is_compared_in_the_layout_that_holds_any_ratio() -> None:
    comparison = compare_arms(header_of_config(DIFFLLAMA), 200_000)
    assert {name: arm.recipe and arm.recipe.to for name, arm in comparison.arms.items()} == {
        "source": None, "uniform": "motif", "differentiated": "motif", "equal parameters": "motif",
        "equal FLOPs": "motif", "equal query heads": "motif",
    }  # fmt: skip
    assert comparison.arms["equal parameters"].model.sizes.heads.ratio > 1


def test_what_there_is_none_of() -> None:
    at_the_limit = SMALL | {"num_attention_heads": 24}
    comparison = compare_arms(header(at_the_limit), 200_000)
    assert list(comparison.arms) == ["source", "uniform"]
    assert comparison.missing == {
        "differentiated": "no ratio above the source's 5:1 is within 5:1",
        "equal parameters": "no ratio above the source's 5:1 is within 5:1",
        "equal FLOPs": "no ratio above the source's 5:1 is within 5:1",
        "equal query heads": "no ratio above the source's up to 5:1 makes 24 query heads",
    }


def test_a_budget_that_is_no_growth() -> None:
    parameters = checkpoint_figures(header(SMALL)).num_parameters
    for budget in (1, parameters):
        with pytest.raises(PlanError, match=r"the source has 59\.68 K parameters and growth never shrinks it"):
            compare_arms(header(SMALL), budget)
    # Something grows, however little is asked for.
    nearest = compare_arms(header(SMALL), parameters + 1).arms["uniform"].recipe
    assert nearest == make_recipe({"depth": 1})


@pytest.mark.parametrize(
    ("text", "budget"),
    [("7B", 7 * 10**9), ("12.7b", 12_700_000_000), ("700M", 7 * 10**8), ("1.5K", 1500), ("1300000", 1_300_000),
     (" 2 T ", 2 * 10**12)],
)  # fmt: skip
def test_a_budget_is_read(text: str, budget: int) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-7B", "7GB", "7BB", "0.0001", "seven", "1e9", "7,0B"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_budget(text)
    assert str(error.value) == f"--budget: expected a number of parameters such as 7B, 700M or 1300000, got {text!r}"
