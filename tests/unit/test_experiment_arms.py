"""Arms become training runs whose budgets are matched, and that share the beginning that they say they share."""

from pathlib import Path
from typing import Any

import pytest

from gdagrow.errors import GdagrowError, RecipeError
from gdagrow.experiment.arms import Arm, make_arms
from gdagrow.experiment.recipe import merged, read_experiment
from gdagrow.train.dry_run import forecast
from tests.experiments import CONFIG, experiment, with_arms, write_experiment

GROWN: dict[str, Any] = {"told": "grown", "from": "none", "growth": {"expand": {"signal": 2}}}


def of_base(**changes: Any) -> dict[str, Any]:
    return {"base": {**experiment()["base"], **changes}}


def arms_of(tmp_path: Path, **changes: Any) -> dict[str, Arm]:
    return make_arms(read_experiment(write_experiment(tmp_path / "recipe.yaml", **changes)), tmp_path / "text")


def test_an_arm_is_the_base_with_what_it_has_of_its_own(tmp_path: Path) -> None:
    own = {"told": "wide", "config": {"num_noise_heads": 4}, "steps": 20, "batch_size": 2}
    made = arms_of(tmp_path, **with_arms(wide=own))
    recipe = made["wide"].recipe
    assert recipe.model.config == {**CONFIG, "num_noise_heads": 4}
    assert (recipe.steps, recipe.batch_size, recipe.context_length) == (20, 2, 32)
    assert recipe.data.train == (str(tmp_path / "text" / "code" / "train.bin"),)
    assert (recipe.health_every, made["signal"].recipe.health_every) == (0, 2)  # health is that of copies
    assert made["wide"].tokens == 20 * 2 * 32
    assert list(made) == ["none", "signal", "uniform", "wide"]


def test_an_arm_may_go_on_from_one_that_is_matched(tmp_path: Path) -> None:
    wide = {"told": "1:1", "config": {"num_noise_heads": 4}, "parameters": "none"}
    made = arms_of(tmp_path, **with_arms(grown={**GROWN, "from": "wide"}, wide=wide))
    assert made["grown"].config["intermediate_size"] == made["wide"].config["intermediate_size"] != 24


def test_sizes_that_a_config_leaves_to_its_defaults_are_known(tmp_path: Path) -> None:
    llama = {"model_type": "llama", "num_noise_heads": None, "num_key_value_heads": None, "head_dim": None}
    sizes = arms_of(tmp_path, **with_arms(standard={"told": "x", "config": llama}))["standard"].sizes
    assert (sizes.head_dim, sizes.heads.num_kv_groups, sizes.heads.num_query_heads) == (2, 8, 8)


def test_arms_of_other_contexts_are_held_against_the_same_text(tmp_path: Path) -> None:
    made = arms_of(tmp_path, **with_arms(long={"told": "x", "context_length": 128, "batch_size": 1}))
    assert (made["none"].recipe.evaluate_on, made["long"].recipe.evaluate_on) == (8, 2)  # of 32 and 128 tokens
    with pytest.raises(RecipeError, match="arm long: context_length 96 does not divide the held-out text of other"):
        arms_of(tmp_path, **with_arms(long={"told": "x", "context_length": 96}))


def test_the_step_of_growths_is_said_once(tmp_path: Path) -> None:
    early = {**GROWN, "growth": {"at": 8, "expand": {"signal": 2}}}
    made = arms_of(tmp_path, **with_arms(early=early))
    assert {name: arm.fork for name, arm in made.items()} == {"none": None, "signal": 4, "uniform": 4, "early": 8}


def test_parameters_are_matched_to_a_unit_of_the_ffn(tmp_path: Path) -> None:
    wide = {"told": "1:1", "config": {"num_noise_heads": 4}, "parameters": "none"}
    equal = {"told": "x", "from": "none", "growth": {"expand": {"signal": 2, "hidden": 2}}, "parameters": "uniform"}
    made = arms_of(tmp_path, **with_arms(wide=wide, equal=equal))
    # A unit of the FFN is a row of gate and up and a column of down: 3 x hidden parameters, in one layer.
    assert abs(made["wide"].parameters - made["none"].parameters) <= 3 * 16 / 2
    assert made["wide"].config["intermediate_size"] != 24
    assert abs(made["equal"].parameters - made["uniform"].parameters) <= 3 * 32 / 2
    assert made["equal"].recipe.growth[0].expand.as_dict().keys() >= {"signal", "hidden", "ffn_to"}


def test_flops_are_matched_to_a_step(tmp_path: Path) -> None:
    short = {"told": "short", "from": "none", "growth": {"expand": {"uniform": 2}}, "flops": "signal"}
    made = arms_of(tmp_path, **with_arms(short=short))
    of_a_step = forecast(made["short"].recipe, 1).legs[-1].flops_per_step
    assert abs(made["short"].flops - made["signal"].flops) <= of_a_step / 2
    assert made["short"].recipe.steps < made["signal"].recipe.steps
    # The same share of what is left decays: 3 of 8 steps.
    assert made["short"].recipe.schedule.decay == max(1, round(3 * (made["short"].recipe.steps - 4) / 8))


def test_flops_count_what_an_arm_goes_on_from_once(tmp_path: Path) -> None:
    made = arms_of(tmp_path)
    legs = forecast(made["uniform"].recipe, 1).legs
    assert made["uniform"].own_flops == legs[1].flops_per_step * 8
    assert made["uniform"].flops == legs[0].flops_per_step * 4 + made["uniform"].own_flops
    assert made["none"].flops == made["none"].own_flops == legs[0].flops_per_step * 12


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (with_arms(signal={**GROWN, "growth": {"at": 6, "expand": {"signal": 2}}}),
         "arm signal grows after step 6, where none leaves no state; let save_every (4) divide it"),
        (with_arms(signal={**GROWN, "steps": 40, "growth": {"at": 12, "expand": {"signal": 2}}}),
         "arm signal grows after step 12, where none leaves no state"),
        (with_arms(short={**GROWN, "steps": 6}),
         "arm short goes on from none at step 4, but until there it has another schedule (wsd is the same"),
        (with_arms(wide={"told": "x", "config": {"num_noise_heads": 4, "num_key_value_heads": 8, "hidden_size": 64},
                         "parameters": "none"}),
         "parameters, more than the"),
        (with_arms(short={"told": "x", "from": "none", "growth": {"at": 8, "expand": {"uniform": 2}},
                          "flops": "tiny"}, tiny={"told": "x", "steps": 2}),
         "arm short: its training takes as many FLOPs as that of tiny before step 8, where it grows; grow it earlier"),
        (with_arms(bad={"told": "x", "config": {"num_noise_heads": 3}}), "arm bad: config.json: num_attention_heads 8"),
        ({"maps": {"every": 6, "seeds": 1}}, "maps: every 6 steps is not where arm none leaves states; let save_every"),
        (of_base(model={"config": dict(CONFIG), "confg": 1}), "arm none: unknown key 'model.confg'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(GdagrowError) as error:
        arms_of(tmp_path, **changes)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (with_arms(lone={"told": "x", "from": "none"}), "from and growth go together"),
        (with_arms(lone={**GROWN, "from": "nine"}), "arms.lone.from: there is no arm 'nine', only lone, none"),
        (with_arms(lone={**GROWN, "from": "signal"}), "arms.lone: signal goes on from another arm itself; name that"),
        (with_arms(lone={"told": "x", "parameters": "other"}, other={"told": "x", "parameters": "none"}),
         "arms.lone: other is matched to another arm itself"),
        (with_arms(lone={**GROWN, "config": {"hidden_size": 8}}), "has its config, text, context, batches and"),
        (with_arms(lone={"told": "x", "multipliers": True}), "multipliers are of a growth, and the arm has none"),
        (with_arms(lone={"told": "x", "text": "prose"}), "arms.lone: there is no text 'prose', only code"),
        (with_arms(lone={"told": "x", "steps": 3, "flops": "none"}), "flops chooses the steps"),
        ({"seeds": [1, 1]}, "seeds: expected each once"),
        ({"seeds": [1]}, "seeds"),
        ({"tune": {"learning_rates": [1e-3, 2e-3], "steps": 2, "seed": 1}}, "tune: seed 1 is one of the experiment's"),
        ({"maps": {"every": 2, "seeds": 3}}, "maps: expected at most 2 seeds, got 3"),
        (of_base(seed=3), "base: seed belong to arms or to the experiment"),
        (of_base(model={"directory": "x"}), "base: expected model with a config"),
        ({"comparisons": [{"told": "x", "matched": "y", "reference": "none", "arms": ["ten"]}]},
         "comparisons (x): there is no arm 'ten'"),
        ({"comparisons": [{"told": "x", "matched": "y", "reference": "none", "arms": ["signal", "none"]}]},
         "comparisons.0: x: expected reference and arms to name each arm once"),
        (with_arms(lone={"told": "x", "learning_rate_of": "ten"}), "arms.lone.learning_rate_of: there is no arm 'ten'"),
        (with_arms(lone={**GROWN, "from": "wide"}, wide={"told": "x", "parameters": "lone"}),
         "arms: lone needs wide needs lone, so that none can be the first"),
        (with_arms(**{"../lone": {"told": "x"}}), "string should match pattern"),
        ({"tune": {"learning_rates": [1e-3, 1.0000001e-3], "steps": 2, "seed": 9}}, "expected each once"),
        (of_base(model={"config": 5}), "base: expected model with a config"),
        ({"scales": {"quick": 5}}, "scales.quick: input should be a valid dictionary"),
        ({"wrong": 1}, "unknown key 'wrong'"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_none_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read_experiment(write_experiment(tmp_path / "recipe.yaml", **changes))
    assert told in str(error.value)
    assert str(error.value).startswith(f"recipe {tmp_path / 'recipe.yaml'}: ")


def test_a_scale_is_what_is_other_there(tmp_path: Path) -> None:
    scales = {"tiny": {"base": {"steps": 8, "optimizer": {"betas": [0.8, 0.9]}}, "seeds": [5, 6], "health": None}}
    path = write_experiment(tmp_path / "recipe.yaml", scales=scales)
    recipe = read_experiment(path, "tiny")
    assert (recipe.base["steps"], recipe.seeds) == (8, (5, 6))
    assert recipe.base["optimizer"] == {"learning_rate": 3e-3, "betas": [0.8, 0.9]}
    with pytest.raises(RecipeError, match="there is no scale 'gpu'; it has tiny"):
        read_experiment(path, "gpu")


def test_changes_are_merged_mapping_by_mapping() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": None, "e": 4}, "d": 5}) == {
        "a": {"c": 2, "e": 4},
        "d": 5,
    }
