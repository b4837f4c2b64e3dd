"""Views on views: what a tensor is of what is stored, through a conversion, more layers and rescaled gains."""

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from gdagrow.archs import architecture_of
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.weight_files import RowFiles
from gdagrow.header import Header
from gdagrow.hints import hints_of
from gdagrow.lambda_init import lambda_init
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.reading import open_reader
from gdagrow.recipe import make_recipe
from gdagrow.row_files import open_rows
from gdagrow.views import Origin, View, origin_of, why_float64
from gdagrow.views.convert import MADE
from gdagrow.views.deeper import MOVED, NEW_BLOCK
from gdagrow.views.wider import RESCALED, with_gains
from tests.checkpoints import write_checkpoint
from tests.diffllama import save_diffllama

LAYER = "model.layers.{}.".format
ATTENTION = "model.layers.{}.self_attn.".format
SHARE = 40 / 44  # 2 copies of 20 features among 44
# Layers 0, 1, 2 become 0, 0 again, 1, 1 again, 2.
RECIPE = {"insert": "after:0,1", "hidden_to": 44}


@pytest.fixture(scope="module")
def motif(tmp_path_factory: pytest.TempPathFactory) -> GrowthPlan:
    directory = tmp_path_factory.mktemp("motif")
    write_checkpoint(directory, hidden=20, layers=3, activation="silu", lambda_dtype=torch.float32)
    return make_plan(read_header(directory), make_recipe(RECIPE))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> GrowthPlan:
    directory = tmp_path_factory.mktemp("diffllama")
    save_diffllama(directory, (20, 24, 3, 12, 4, 6, False), dtype=torch.bfloat16)
    return make_plan(read_header(directory), make_recipe({"to": "motif", **RECIPE}))


def moved_by(old: int, new: int) -> float:
    return (1 - lambda_init(old)) / (1 - lambda_init(new))


def test_what_tensors_of_a_deeper_and_wider_model_are(motif: GrowthPlan) -> None:
    header = motif.header
    assert isinstance(header, View)
    gain, eps = sqrt(SHARE), torch.finfo(torch.float64).eps
    expected = {
        "model.embed_tokens.weight": Origin("model.embed_tokens.weight"),
        "model.norm.weight": Origin("model.norm.weight", factor=gain),
        ATTENTION(0) + "subln.weight": Origin(ATTENTION(0) + "subln.weight"),
        ATTENTION(1) + "q_proj.weight": Origin(ATTENTION(0) + "q_proj.weight", anew=NEW_BLOCK),
        ATTENTION(1) + "o_proj.weight": Origin(ATTENTION(0) + "o_proj.weight", anew=NEW_BLOCK, is_zero=True),
        LAYER(1) + "input_layernorm.weight": Origin(
            LAYER(0) + "input_layernorm.weight", factor=gain, anew=NEW_BLOCK
        ),
        ATTENTION(1) + "subln.weight": Origin(ATTENTION(0) + "subln.weight", anew=NEW_BLOCK),
        ATTENTION(2) + "subln.weight": Origin(
            ATTENTION(1) + "subln.weight", factor=moved_by(1, 2)
        ),
        ATTENTION(4) + "lambda_k2": Origin(ATTENTION(2) + "lambda_k2", anew=MOVED),
        ATTENTION(4) + "lambda_k1": Origin(ATTENTION(2) + "lambda_k1"),
        LAYER(4) + "mlp.down_proj.weight": Origin(LAYER(2) + "mlp.down_proj.weight"),
    }  # fmt: skip
    for name, origin in expected.items():
        found = origin_of(header, name)
        assert found.factor == pytest.approx(origin.factor, rel=4 * eps), name
        assert (found.name, found.rows, found.anew, found.is_zero) == (
            origin.name, origin.rows, origin.anew, origin.is_zero
        ), name  # fmt: skip
    # Below the gains there are the deeper layers, which are the first that count if they are asked for.
    name = ATTENTION(2) + "subln.weight"
    assert origin_of(header, name, below=header.under) == Origin(name)
    assert origin_of(header, name, below=header) == Origin(name)


def test_what_tensors_of_a_converted_deeper_and_wider_model_are(converted: GrowthPlan) -> None:
    """What the conversion makes has no past, whatever is made of it; what it reorders is still what is stored."""
    header = converted.header
    query = origin_of(header, ATTENTION(4) + "q_proj.weight")
    assert (query.name, query.factor, query.anew, query.is_zero) == (ATTENTION(2) + "q_proj.weight", 1.0, None, False)
    assert query.rows is not None
    assert sorted(query.rows) == list(range(12 * 6))
    for layer in (0, 2):
        subln = origin_of(header, ATTENTION(layer) + "subln.weight")
        assert (subln.name, subln.anew, subln.is_zero) == (None, MADE, False)
    made, moved = (origin_of(header, ATTENTION(2) + name) for name in ("lambda_q1", "lambda_q2"))
    assert (made.name, made.anew) == (ATTENTION(1) + "lambda_q1", MADE)
    assert (moved.name, moved.anew) == (ATTENTION(1) + "lambda_q2", MOVED)
    assert origin_of(header, ATTENTION(3) + "k_proj.weight").anew == NEW_BLOCK
    assert origin_of(header, ATTENTION(3) + "lambda_q1").anew == NEW_BLOCK


def test_why_float64(motif: GrowthPlan, converted: GrowthPlan) -> None:
    for plan, more in ((motif, set()), (converted, {"lambda_q1", "lambda_k1", "subln.weight"})):
        reasons = {tensor.name: why_float64(plan.header, tensor.source.name) for tensor in plan.tensors}
        assert {name for name, reason in reasons.items() if reason} == {
            name for name, info in plan.header.tensors.items() if info.dtype == "F64"
        }
        by_reason: dict[str, set[str]] = {}
        for name, reason in reasons.items():
            if reason:
                by_reason.setdefault(reason, set()).add(name.split("layers.")[-1].split(".", 1)[-1])
        gains = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
        assert by_reason.pop(RESCALED) == gains
        assert by_reason.pop(MOVED) == {f"self_attn.{name}" for name in ("lambda_q2", "lambda_k2", "subln.weight")}
        assert by_reason == ({MADE: {f"self_attn.{name}" for name in more}} if more else {})


def test_nothing_is_float64_that_was_not_if_all_was(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=torch.float64)
    plan = make_plan(read_header(tmp_path), make_recipe({"depth": 1, "insert": "bottom", "hidden_to": 40}))
    assert not any(why_float64(plan.header, name) for name in plan.header.tensors)
    assert not any("stored in float64" in hint for hint in hints_of(plan))


def octets_of(rows: RowFiles, name: str, begin: int, end: int) -> bytes:
    found = rows.find(name, begin, end)
    octets = bytearray(b"\xff" * found.num_bytes)
    rows.read(found, 0, memoryview(octets))
    return bytes(octets)


@pytest.mark.parametrize("kind", ["motif", "converted"])
def test_rows_of_a_view_are_those_of_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    """By the reader that makes tensors, and by the one of bytes, which a certificate has and that knows no torch."""
    plan: GrowthPlan = request.getfixturevalue(kind)
    with open_reader(plan.header) as reader, open_rows(plan.header) as rows:
        for name, info in plan.header.tensors.items():
            whole = reader.tensor(name)
            assert whole.shape == info.shape
            for step in (1, 7):
                pieces = [reader.rows(name, at, min(at + step, len(whole))) for at in range(0, len(whole), step)]
                assert torch.equal(torch.cat(pieces), whole), name
                found = b"".join(
                    octets_of(rows, name, at, min(at + step, len(whole))) for at in range(0, len(whole), step)
                )
                assert found == bytes(tensor_bytes(whole.contiguous())), name
            assert octets_of(rows, name, 0, len(whole)) == found


SIZES = [(20, 20), (20, 60), (20, 21), (20, 39), (20, 44), (7, 100)]


@pytest.mark.parametrize(("hidden", "wider"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gains_and_eps_are_those_of_the_mean_square(
    tmp_path: Path, hidden: int, wider: int, dtype: torch.dtype
) -> None:
    """`m` copies of `h` features among `h'`: the mean square is `m h / h'` times what it was."""
    write_checkpoint(tmp_path, hidden=hidden, dtype=dtype)
    header = read_header(tmp_path)
    found = with_gains(header, architecture_of(header.config), hidden, wider)
    if wider % hidden == 0:
        assert found is header
        return
    share = wider // hidden * hidden / wider
    assert found.config == {**header.config, "rms_norm_eps": 1e-6 * share}
    assert found.tensors.keys() == header.tensors.keys()
    with open_reader(header) as before, open_reader(found) as after:
        for name in header.tensors:
            old, new = before.tensor(name), after.tensor(name)
            if "norm.weight" in name:
                assert new.dtype == torch.float64
                assert torch.equal(new, old.double() * sqrt(share)), name
            else:
                assert new.dtype == old.dtype
                assert torch.equal(new, old), name


@pytest.mark.parametrize("eps", ["1e-6", None, True, 0, -1e-6, float("nan"), float("inf")])
def test_an_eps_that_is_no_number_is_refused(tmp_path: Path, eps: object) -> None:
    header = write_and_read(tmp_path, eps)
    with pytest.raises(CheckpointError) as error:
        make_plan(header, make_recipe({"hidden_to": 44}))
    assert str(error.value) == (
        "config.json: rms_norm_eps: expected a positive number, which hidden 20 to 44 rescales, got "
        f"{eps!r}; correct the config"
    )
    assert make_plan(header, make_recipe({"hidden_to": 60})).config["rms_norm_eps"] is eps, "it has no part in that"


def write_and_read(directory: Path, eps: object) -> Header:
    write_checkpoint(directory, hidden=20)
    header = read_header(directory)
    return replace(header, config={**header.config, "rms_norm_eps": eps})


def test_diffllama_shares_its_eps(tmp_path: Path) -> None:
    save_diffllama(tmp_path, (20, 24, 1, 4, 4, 6, False), dtype=torch.bfloat16)
    with pytest.raises(PlanError) as error:
        make_plan(read_header(tmp_path), make_recipe({"hidden_to": 44}))
    assert str(error.value) == (
        "hidden 20 to 44 is no multiple, so that the eps of the norms must change, which the diffllama layout shares "
        "with its sub-norm; convert the checkpoint as well with --to motif (to: motif in a recipe), or choose a "
        "multiple of 20"
    )
    assert make_plan(read_header(tmp_path), make_recipe({"hidden_to": 60})).after.hidden == 60


def test_a_list_with_an_entry_for_each_layer_grows_with_them(tmp_path: Path) -> None:
    """`layer_types`, which transformers 5 writes for some models; one of another length is none of these."""
    kinds = ["a", "b", "c"]
    for name, found, grown in (("right", kinds, ["a", "a", "b", "c", "c"]), ("other", [*kinds, "d"], [*kinds, "d"])):
        write_checkpoint(tmp_path / name, layers=3, extra={"layer_types": found})
        config: dict[str, Any] = {
            **make_plan(read_header(tmp_path / name), make_recipe({"insert": "after:0,2"})).config
        }
        assert (config["num_hidden_layers"], config["layer_types"]) == (5, grown)
        json.dumps(config)
