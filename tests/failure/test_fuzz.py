"""Mutated files of every kind through what reads them: a few thousand of what benchmarks/fuzz.py runs 200,000 of."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.errors import GdagrowError
from gdagrow.formats.pickle_tree import PickleRefusedError, parse
from gdagrow.formats.strict_json import parse_object
from gdagrow.formats.torch_file import read_torch_file
from gdagrow.plain_yaml import read_yaml
from gdagrow.recipe import make_recipe
from gdagrow.train.recipe import make_train_recipe
from tests.fuzzing import running
from tests.fuzzing.targets import TARGETS, Target
from tests.growths import RANDOM
from tests.trainings import recipe

INPUTS = 1500
# What takes longer to begin than to run; benchmarks/fuzz.py has them.
SLOW = {"config (DiffLlama)", "experiment", ".distcp values", "results.json"}

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in SLOW])
def test_nothing_but_an_error_of_ours_comes_out(name: str, tmp_path: Path) -> None:
    counts = {target.name: count for target, count in running.shares(INPUTS, list(TARGETS))}
    outcome = running.run_target(TARGETS[name], tmp_path / "work", seed=5, count=counts[name])
    assert [(finding.number, finding.place) for finding in outcome.findings] == []
    assert outcome.accepted + outcome.refused == counts[name]
    assert outcome.refused > 0


def misbehave(number: int, elsewhere: Path, kept: list[bytes]) -> None:
    """What no reader does, by the number of the input."""
    match number:
        case 0:
            raise KeyError("x")
        case 1:
            while True:
                pass
        case 2:
            kept.append(b"x" * (running.MORE_BYTES * 2))
        case 3:
            elsewhere.write_bytes(b"")
        case 4:
            subprocess.run(["true"], check=True)
        case 5:
            os.abort()
        case _:
            raise GdagrowError("refused")


def test_what_none_may_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SECONDS", 0.2)
    monkeypatch.setattr(running, "MORE_BYTES", 50 * 2**20)
    kept: list[bytes] = []
    is_begun: list[bool] = []

    def make(directory: Path) -> Any:
        is_begun.clear()
        return directory / "file", [b""], lambda number: is_begun and misbehave(number, tmp_path / "elsewhere", kept)

    def mutate(*_: object) -> bytes:
        is_begun.append(True)
        return b""

    target = Target("misbehaving", 1, mutate, make)
    outcome = running.run_target(target, tmp_path / "work", seed=0, count=7)
    found = {finding.number: finding.what for finding in outcome.findings}
    told = ("raises", "slow", "memory", "does what none may", "does what none may", f"dies ({int(signal.SIGABRT)})")
    assert found == dict(enumerate(told))
    assert (outcome.accepted, outcome.refused) == (3, 1)


@RANDOM
@given(st.binary(max_size=60))
def test_pickles_of_any_bytes(raw: bytes) -> None:
    try:
        parse(raw, {("collections", "OrderedDict")})
    except PickleRefusedError:
        return


@RANDOM
@given(st.text(max_size=80) | PLAIN.map(lambda value: json.dumps(value)))
def test_json_of_any_text(text: str) -> None:
    try:
        found = parse_object(text.encode("utf-8", "surrogatepass"), "x")
    except GdagrowError:
        return
    assert found == json.loads(text)


@settings(RANDOM, max_examples=200)
@given(st.text(st.characters(codec="utf-8"), max_size=40) | PLAIN.map(lambda value: json.dumps(value)))
def test_yaml_of_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        json.dumps(read_yaml(path, "x"), skipkeys=True)
    except GdagrowError:
        return


FIELDS = st.sampled_from(
    ["signal", "noise", "select", "hidden_to", "depth", "insert", "like", "rope_theta", "seed", "x"]
)


@RANDOM
@given(st.dictionaries(FIELDS, PLAIN | st.sampled_from(["4:1", "given:x", "after:0", "top"]), max_size=4))
def test_growths_of_any_values(values: dict[str, Any]) -> None:
    try:
        asked = make_recipe(values)
    except GdagrowError:
        return
    assert make_recipe(asked.as_dict()) == asked


@settings(RANDOM, max_examples=200)
@given(st.data())
def test_training_recipes_of_any_values(data: st.DataObject) -> None:
    values = recipe(growth=[{"at": 4, "expand": {"signal": 2}}])
    place = data.draw(
        st.sampled_from([values, values["data"], values["optimizer"], values["schedule"], values["growth"][0]])
    )
    place[data.draw(st.sampled_from([*place, "freeze", "x"]))] = data.draw(PLAIN)
    try:
        asked = make_train_recipe(values, "x")
    except GdagrowError:
        return
    assert make_train_recipe(asked.as_dict(), "x") == asked


@settings(RANDOM, max_examples=60)
@given(PLAIN)
def test_torch_files_of_any_values(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    torch.save({"value": value, "tensor": torch.zeros(2)}, path)
    assert list(read_torch_file(path)) == ["value", "tensor"]
