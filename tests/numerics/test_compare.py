"""`compare`: what it measures is right, it accepts what rounding can do, and it sees one wrong unit in one weight."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdagrow.errors import CheckpointError, CompareError
from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.models.gda import load_model
from gdagrow.output import weights_output
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from gdagrow.verify.logits import compare
from gdagrow.verify.rounding import rounding_budget
from gdagrow.verify.tokens import random_tokens, text_tokens
from tests.checkpoints import write_checkpoint

TOKENS = random_tokens(61, seqs=3, length=24, seed=0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source, grown = tmp_path / "source", tmp_path / "grown"
    write_checkpoint(source, layers=3, lambda_dtype=torch.float32)
    grow(source, grown, signal=2, hidden=3)
    return source, grown


def grow(source: Path, grown: Path, **recipe: object) -> None:
    plan = make_plan(read_header(source), make_recipe(recipe))
    expand(plan, grown, weights_output(plan, 10**9))


def edit(directory: Path, name: str, change: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name].clone())  # type: ignore[operator]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_figures_equal_those_of_the_whole_models(pair: tuple[Path, Path]) -> None:
    source, grown = pair
    edit(grown, "model.norm.weight", lambda weight: weight * 1.01)
    found = compare(source, grown, TOKENS)
    with torch.no_grad():
        a, b = (load_model(path, dtype=torch.float64)(TOKENS).logits for path in pair)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    # The layer-streamed arithmetic is the whole model's, batched otherwise: a few roundings of the largest logit.
    assert found.max_abs == pytest.approx(float((a - b).abs().max()), rel=1e-9)
    assert found.max_rel == pytest.approx(float((a - b).abs().max() / a.abs().max()), rel=1e-9)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert found.top1_agreement == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    assert (found.num_sequences, found.length, found.dtype) == (3, 24, "float64")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0])
def test_growth_stays_well_within_the_budget_whatever_the_condition(
    tmp_path: Path, scale: float, dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path / "source", layers=6, scale=scale)
    grow(tmp_path / "source", tmp_path / "grown", uniform=2)
    found = compare(tmp_path / "source", tmp_path / "grown", TOKENS, dtype=dtype)
    # The budget is for errors that all add up; independent ones were never seen to use a third of it.
    assert found.equivalent
    assert found.max_rel < found.tolerance / 3


def test_the_budget_is_the_formula_of_the_docs() -> None:
    assert rounding_budget(torch.float64, 68, 2.0) == 8 * 2.0 * (2.0**-53 + 10 * 2.0**-53)
    assert rounding_budget(torch.bfloat16, 68, 2.0) == 8 * 2.0 * (2.0**-8 / 1 + 10 * 2.0**-24)


@pytest.mark.parametrize("name", [
    "lm_head.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
])  # fmt: skip
def test_one_unit_in_the_last_place_of_one_weight_is_seen(pair: tuple[Path, Path], name: str) -> None:
    def one_ulp_up(weight: torch.Tensor) -> torch.Tensor:
        largest = weight.abs().flatten().argmax()
        weight.view(torch.int16).view(-1)[largest] += 1
        return weight

    assert compare(*pair, TOKENS).equivalent
    edit(pair[1], name, one_ulp_up)
    found = compare(*pair, TOKENS)
    assert not found.equivalent
    assert found.max_rel > 1000 * found.tolerance


def test_changes_name_what_grew_and_nothing_else(pair: tuple[Path, Path]) -> None:
    changes = {change.what: (change.source, change.grown) for change in compare(*pair, TOKENS).changes}
    parameters = tuple(f"{sum(info.num_elements for info in read_header(path).tensors.values()):,}" for path in pair)
    assert changes == {
        "ratio": ("3:1", "6:1"), "signal heads": ("6", "12"), "hidden size": ("32", "96"), "parameters": parameters
    }  # fmt: skip


def test_a_checkpoint_equals_itself_bit_for_bit(pair: tuple[Path, Path]) -> None:
    found = compare(pair[0], pair[0], TOKENS)
    # The source runs in a batch of twice the size, and a matrix product may then sum in another order.
    assert found.max_rel < found.tolerance / 3
    assert found.changes == ()
    assert 0 <= found.kl < 1e-15


def test_a_broken_model_is_different_and_its_figures_are_json(pair: tuple[Path, Path]) -> None:
    edit(pair[1], "model.norm.weight", lambda weight: weight * math.nan)
    found = compare(*pair, TOKENS)
    assert not found.equivalent
    assert found.as_dict()["max_abs"] is None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["equivalent"] is False


def test_a_broken_source_cannot_be_compared_with(pair: tuple[Path, Path]) -> None:
    edit(pair[0], "model.norm.weight", lambda weight: weight * math.nan)
    with pytest.raises(CompareError, match="the model's own logits are not finite"):
        compare(*pair, TOKENS)


def test_other_vocabularies_cannot_be_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", vocab=62)
    with pytest.raises(CompareError, match=r"vocabulary of 61 tokens and .*other one of 62"):
        compare(pair[0], tmp_path / "other", TOKENS)


def test_a_checkpoint_that_does_not_fit_its_table_is_refused(pair: tuple[Path, Path]) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps({**config, "intermediate_size": 47}))
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight has shape \[48, 96\], expected \[47, 96\]"):
        compare(*pair, TOKENS)


def test_random_tokens_repeat() -> None:
    assert torch.equal(random_tokens(61, seqs=3, length=24, seed=0), TOKENS)
    assert not torch.equal(random_tokens(61, seqs=3, length=24, seed=1), TOKENS)


def test_text_is_bytes_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(50)))
    tokens = text_tokens(tmp_path / "text", tmp_path, 256, seqs=3, length=20)
    assert tokens.tolist() == [list(range(20)), list(range(20, 40))]
    assert text_tokens(tmp_path / "text", tmp_path, 256, seqs=3, length=80).shape == (1, 50)
    with pytest.raises(CompareError, match="token 49 is outside the vocabulary of 49"):
        text_tokens(tmp_path / "text", tmp_path, 49, seqs=3, length=20)
    (tmp_path / "text").write_bytes(b"x")
    with pytest.raises(CompareError, match="at least two tokens, got 1"):
        text_tokens(tmp_path / "text", tmp_path, 256, seqs=3, length=20)
    with pytest.raises(CompareError, match="cannot be read"):
        text_tokens(tmp_path, tmp_path, 256, seqs=3, length=20)


def test_text_is_read_by_the_checkpoints_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"grow": 0, "heads": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("grow heads grow x")
    assert text_tokens(tmp_path / "text", tmp_path, 3, seqs=1, length=9).tolist() == [[0, 1, 0, 2]]
    shutil.copy(tmp_path / "text", tmp_path / "tokenizer.json")
    with pytest.raises(CompareError, match=r"tokenizer\.json cannot be used"):
        text_tokens(tmp_path / "text", tmp_path, 3, seqs=1, length=9)
