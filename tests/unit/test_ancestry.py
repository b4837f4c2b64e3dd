"""Lineages of several growths against the same composed by hand, from what `growth.json` says alone."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from gdagrow.archs.motif import Motif
from gdagrow.errors import CheckpointError
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import make_recipe
from gdagrow.record import RECORD_FILE, lineage
from gdagrow.verify.ancestry import Ancestry, ancestry_from, last_growth, whole_ancestry
from tests.growths import RANDOM, header

CONFIG: dict[str, Any] = {
    "model_type": "motif", "hidden_size": 5, "intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_noise_heads": 2, "head_dim": 4, "vocab_size": 7, "hidden_act": "silu",
    "tie_word_embeddings": False, "use_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip

# What each new index of an axis was in one growth: an old index, or None.
Old = list[int | None]


@st.composite
def recipes(draw: st.DrawFn, plan: GrowthPlan | None, directory: Path, number: int) -> dict[str, Any]:
    """One growth of what a plan makes: some of its axes, at least one."""
    config = CONFIG if plan is None else plan.config
    sizes = Motif().sizes(config)
    recipe: dict[str, Any] = {}
    for axis, size in (("hidden", sizes.hidden), ("ffn", sizes.ffn)):
        how = draw(st.sampled_from(["", "factor", "size"]))
        if how == "factor":
            recipe[axis] = draw(st.integers(2, 3))
        elif how:
            recipe[f"{axis}_to"] = draw(st.integers(size + 1, 3 * size))
    recipe["noise"] = draw(st.integers(1, 2))
    if draw(st.booleans()):
        # Other heads in each layer and group: each once, and some once more.
        ratio, more = sizes.heads.ratio, draw(st.integers(1, 2))
        chosen = {
            layer: [
                [1 + extra.count(head) for head in range(ratio)]
                for _ in range(sizes.heads.num_groups)
                for extra in [draw(st.lists(st.integers(0, ratio - 1), min_size=more, max_size=more))]
            ]
            for layer in range(sizes.num_layers)
        }
        file = directory / f"heads-{number}.yaml"
        file.write_text("layers:\n" + "".join(f"  {layer}: {counts}\n" for layer, counts in chosen.items()))
        recipe |= {"signal": f"{ratio + more}:1", "select": f"given:{file}"}
    else:
        recipe["signal"] = recipe["noise"] * draw(st.integers(1, 2))
    where = draw(st.sampled_from(["", "top", "bottom", "even"]))
    if where or recipe == {"noise": 1, "signal": 1}:
        recipe |= {"depth": draw(st.integers(1, 2)), "insert": where or "top"}
    return recipe


def features(found: dict[str, Any], axis: str) -> Old:
    runs = [i for start, stop in found[axis] for i in range(start, stop)]
    return [*runs, *[None] * found.get("fresh", {}).get(axis, 0)]


def of_layer(found: dict[str, Any], layer: int) -> list[list[list[int]]]:
    by_layer: list[list[list[list[int]]]] | None = found.get("signal_heads_by_layer")
    heads: list[list[list[int]]] = found["signal_heads"] if by_layer is None else by_layer[layer]
    return heads


def through(steps: list[dict[str, Any]], axis: str, new: int) -> int | None:
    """Follow one new index back to the first source, growth by growth."""
    at: int | None = new
    for step in reversed(steps):
        if at is None:
            return None
        at = features(step, axis)[at] if axis in ("hidden", "ffn") else step[axis][at]
    return at


def head_through(steps: list[dict[str, Any]], layer: int, group: int, slot: int) -> tuple[int, int]:
    for step in reversed(steps):
        group, slot = of_layer(step, layer)[group][slot]
        layer = step.get("layers", range(99))[layer]
    return group, slot


def is_new(steps: list[dict[str, Any]], layer: int) -> bool:
    for step in reversed(steps):
        if layer in step.get("new_layers", []):
            return True
        layer = step.get("layers", range(99))[layer]
    return False


def require_composed(found: Ancestry, steps: list[dict[str, Any]], plan: GrowthPlan) -> None:
    after = plan.after
    layers = [step.get("layers", list(range(99))) for step in steps]
    for layer in range(after.num_layers):
        source = layer
        for of_step in reversed(layers):
            source = of_step[source]
        assert found.layers.source[layer] == source
        assert (layer in found.layers.new) is is_new(steps, layer)
        maps = found.maps.by_layer[layer]
        assert list(maps.of("group", None)) == [through(steps, "noise_heads", g) for g in range(after.heads.num_groups)]
        assert list(maps.of("kv", None)) == [through(steps, "kv_groups", c) for c in range(after.heads.num_kv_groups)]
        for group in range(after.heads.num_groups):
            pairs = [head_through(steps, layer, group, slot) for slot in range(after.heads.ratio)]
            assert [(list(maps.of("group", None))[group], old) for old in maps.of("signal", group)] == pairs
        for axis, size in (("hidden", after.hidden), ("ffn", after.ffn)):
            index_map = maps.of(axis, None)
            olds = [old if old < index_map.old_size else None for old in index_map]
            assert olds == [through(steps, axis, new) for new in range(size)]
            fresh = [old for old in index_map if old >= index_map.old_size]
            assert len(set(fresh)) == len(fresh), "each comes from another nothing"


@settings(RANDOM, max_examples=120)
@given(st.data())
def test_several_growths_are_composed(data: st.DataObject) -> None:
    plan, plans, steps = None, [], []
    with TemporaryDirectory() as name:
        directory = Path(name)
        for number in range(data.draw(st.integers(1, 3))):
            recipe = data.draw(recipes(plan, directory, number))
            plan = make_plan(header(CONFIG if plan is None else plan.config), make_recipe(recipe))
            plans.append(plan)
            steps.append(lineage(plan))
        assert plan is not None
        event(f"{len(plans)} growths")
        event("deeper" if any(one.layers.new for one in plans) else "as deep")
        records = [{"lineage": json.loads(json.dumps(step))} for step in steps]
        (directory / RECORD_FILE).write_text(json.dumps({**records[-1], "history": records[:-1]}))
        for first, origin in enumerate(plans):
            found = ancestry_from(directory, origin.before, plan.after, untied=False)
            assert found is not None
            # A growth that leaves all sizes as they were has none before it that can be told from it.
            assert (found.before, found.num_growths) == (origin.before, len(plans) - first)
            require_composed(found, steps[first:], plan)
            fresh = any(one.maps.common.of("hidden", None).num_fresh for one in plans[first:])
            assert found.repairs is (fresh or any(one.layers.moved for one in plans[first:]))
        require_composed(whole_ancestry(directory / RECORD_FILE, plan.after), steps, plan)
        require_composed(last_growth(directory, plan.after), steps[-1:], plan)


def test_a_history_that_leads_elsewhere(tmp_path: Path) -> None:
    plan = make_plan(header(CONFIG), make_recipe({"depth": 1, "hidden_to": 8}))
    record = {"lineage": lineage(plan)}
    (tmp_path / RECORD_FILE).write_text(json.dumps({**record, "history": []}))
    deeper = make_plan(header({**CONFIG, "num_hidden_layers": 4}), make_recipe({"hidden": 2})).before
    with pytest.raises(CheckpointError) as error:
        ancestry_from(tmp_path, deeper, plan.after, untied=False)
    assert "hidden 5, FFN 4, 2 layers, not to the source with 2 groups of 2:1 on 1 KV groups" in str(error.value)
    with pytest.raises(CheckpointError, match="hidden: expected runs of 5 old features in all, got 8"):
        ancestry_from(tmp_path, plan.before, plan.before, untied=False)
    (tmp_path / RECORD_FILE).write_text(json.dumps({**record, "history": [record]}))
    with pytest.raises(CheckpointError, match="hidden: expected runs of 5 old features in all, got 8; it is no"):
        whole_ancestry(tmp_path / RECORD_FILE, plan.after)
