"""What is read from the files half a layer at a time is the whole model's: states, losses, decoding, gradients."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gdagrow.errors import CompareError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.models.gda import load_model
from gdagrow.verify import figures
from gdagrow.verify.backward import BackwardPass
from gdagrow.verify.forward import StreamedModel
from gdagrow.verify.logits import Comparison, compare
from gdagrow.verify.tokens import random_tokens
from tests.checkpoints import write_checkpoint
from tests.growths import RANDOM, grow, topologies

TOKENS = random_tokens(61, seqs=3, length=24, seed=0)
# A thousand times eps of float64, for a few hundred dependent operations whose order may differ.
TOLERANCE = 1000 * torch.finfo(torch.float64).eps


def streamed(directory: Path, dtype: torch.dtype = torch.float64) -> StreamedModel:
    return StreamedModel(read_header(directory), dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_states_and_logits_are_the_whole_models_bit_for_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, layers=3, tied=tied, bias=True, lambda_dtype=torch.float32, max_shard_bytes=9000)
    whole = load_model(tmp_path, dtype=dtype)
    with torch.no_grad(), streamed(tmp_path, dtype) as model:
        hidden, expected = model.embed(TOKENS), whole.model.embed_tokens(TOKENS)
        for index in range(6):
            hidden = model.half(index // 2, is_mlp=index % 2 == 1)(hidden)
            if index % 2:
                expected = whole.model.layers[index // 2](expected)
                assert torch.equal(hidden, expected)
        normed = model.last_norm()(hidden)
        (rows,) = model.head_rows(61)
        assert torch.equal(normed @ rows.T, whole(TOKENS).logits)


@settings(RANDOM, max_examples=40)
@given(topologies(dtypes=(torch.float64,)))
def test_gradients_are_those_that_torch_finds(
    tmp_path_factory: pytest.TempPathFactory, topology: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, **topology)
    vocab = topology["vocab"]
    tokens = random_tokens(vocab, seqs=2, length=7, seed=1)
    whole = load_model(directory, dtype=torch.float64)
    loss = whole(tokens, tokens).loss
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    with streamed(directory) as model:
        backward = BackwardPass(model, tokens)
        assert backward.loss == pytest.approx(float(loss.detach()), rel=TOLERANCE)
        found = {name: gradient for part in backward.layers() for name, gradient in part.items()}
        pieces: dict[str, list[torch.Tensor]] = {}
        for begin, part in backward.vocabulary(4):
            assert begin == 4 * len(next(iter(pieces.values()), []))
            for name, rows in part.items():
                pieces.setdefault(name, []).append(rows)
    found |= {name: torch.cat(rows) for name, rows in pieces.items()}
    largest = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    assert found.keys() == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        assert (found[name] - parameter.grad).abs().max() <= TOLERANCE * largest, name


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    write_checkpoint(tmp_path / "source", layers=3, lambda_dtype=torch.float32)
    grow(tmp_path / "source", tmp_path / "grown", {"signal": 2, "hidden": 3})
    return tmp_path / "source", tmp_path / "grown"


def test_losses_are_the_whole_models(pair: tuple[Path, Path]) -> None:
    edit(pair[1], "model.norm.weight", 1.01)
    found = compare(*pair, TOKENS)
    with torch.no_grad():
        losses = [load_model(path, dtype=torch.float64)(TOKENS, TOKENS).loss for path in pair]
    assert found.source_loss == pytest.approx(float(losses[0]), rel=TOLERANCE)
    assert found.grown_loss == pytest.approx(float(losses[1]), rel=TOLERANCE)
    assert found.source_loss != found.grown_loss
    one = compare(*pair, TOKENS[:, :1])
    assert (one.source_loss, one.grown_loss) == (None, None)


@settings(RANDOM, max_examples=20)
@given(st.integers(1, 61 * 72), st.integers(1, 72))
def test_figures_do_not_depend_on_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, elements: int, positions: int
) -> None:
    """The vocabulary and the positions in any pieces give the figures of all at once."""
    directory = made_once(tmp_path_factory)
    whole = compare(directory / "source", directory / "grown", TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_PIECE_ELEMENTS", elements)
        patch.setattr(figures, "_BLOCK_POSITIONS", positions)
        found = compare(directory / "source", directory / "grown", TOKENS)
    for name in ("max_abs", "max_rel", "kl", "source_loss", "grown_loss", "tolerance"):
        # Differences are those of logits, whose last bits may differ with the shapes of the products.
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    assert found.top1_agreement == whole.top1_agreement < 1


def made_once(factory: pytest.TempPathFactory) -> Path:
    directory = factory.getbasetemp() / "pieces"
    if not directory.exists():
        write_checkpoint(directory / "source", layers=1)
        grow(directory / "source", directory / "grown", {"signal": 2})
        edit(directory / "grown", "model.norm.weight", 0.5, slice(0, 16))
    return directory


def test_a_tie_of_the_most_likely_tokens_is_agreement(tmp_path: Path) -> None:
    """Two tokens with the same head row are equally likely, whichever of them stands first in either model."""
    write_checkpoint(tmp_path / "source", layers=1)
    edit(tmp_path / "source", "lm_head.weight", 0.0, slice(0, 60))
    found = compare(tmp_path / "source", tmp_path / "source", TOKENS)
    assert found.top1_agreement == 1


def greedy(directory: Path, prompt: torch.Tensor, num_tokens: int) -> tuple[int, ...]:
    model = load_model(directory, dtype=torch.float64)
    ids = prompt
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return tuple(ids[0, prompt.shape[1] :].tolist())


def test_decoding_writes_what_the_whole_models_write_without_a_cache(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, TOKENS, num_decoded=9)
    assert found.decoding is not None
    assert found.decoding.source == found.decoding.grown == greedy(pair[0], TOKENS[:1], 9)
    assert (found.decoding.prompt_length, found.decoding.same, found.equivalent) == (24, True, True)
    long = compare(*pair, random_tokens(61, seqs=1, length=40, seed=2), num_decoded=1)
    assert long.decoding is not None
    assert long.decoding.prompt_length == 32


def test_decoding_stops_where_the_models_part(pair: tuple[Path, Path]) -> None:
    weight = load_file(pair[1] / "model.safetensors")["lm_head.weight"]
    first = greedy(pair[0], TOKENS[:1], 1)[0]
    # The source's first token becomes the least likely one.
    edit(pair[1], "lm_head.weight", -1.0, slice(first, first + 1))
    assert weight.shape[0] == 61
    found = compare(*pair, TOKENS, num_decoded=5)
    assert found.decoding is not None
    assert found.decoding.source == (first,)
    assert found.decoding.grown == greedy(pair[1], TOKENS[:1], 1) != (first,)
    assert (found.decoding.same, found.equivalent) == (False, False)


def edit(directory: Path, name: str, factor: float, rows: slice = slice(None)) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name][rows] *= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def parts(found: Comparison) -> set[tuple[int | None, str]]:
    return {(part.layer, part.part) for part in found.parts if not part.agrees}


def test_every_part_is_measured_and_only_what_follows_a_difference_differs(pair: tuple[Path, Path]) -> None:
    names = ["signal heads", "noise heads", "differences", "attention", "mlp", "residual"]
    expected = [(None, "embedding"), *((layer, name) for layer in range(3) for name in names)]
    found = compare(*pair, TOKENS)
    assert [(part.layer, part.part) for part in found.parts] == expected
    assert (parts(found), found.first_difference, found.parts_not_compared) == (set(), None, None)
    edit(pair[1], "model.layers.1.mlp.up_proj.weight", 2.0)
    found = compare(*pair, TOKENS)
    assert parts(found) == set(expected[expected.index((1, "mlp")) :])
    assert found.first_difference == next(part for part in found.parts if (part.layer, part.part) == (1, "mlp"))
    assert found.first_difference.max_rel == pytest.approx(1.0, rel=1e-9)


def test_what_lies_behind_the_layers_differs_in_no_part(pair: tuple[Path, Path]) -> None:
    edit(pair[1], "lm_head.weight", 1.01)
    found = compare(*pair, TOKENS)
    assert not found.equivalent
    assert parts(found) == set()


def test_a_lineage_that_is_not_how_it_grew_is_said_although_the_logits_agree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", groups=2)
    grow(tmp_path / "source", tmp_path / "grown", {"signal": "4:1"})
    path = tmp_path / "grown" / "growth.json"
    record = json.loads(path.read_text())
    (first, *others), rest = record["lineage"]["signal_heads"][0], record["lineage"]["signal_heads"][1:]
    assert others[-1] == first
    record["lineage"]["signal_heads"] = [[others[0], first, *others[1:]], *rest]
    path.write_text(json.dumps(record))
    found = compare(tmp_path / "source", tmp_path / "grown", TOKENS)
    assert found.equivalent
    assert found.first_difference is not None
    assert (found.first_difference.layer, found.first_difference.part) == (0, "signal heads")
    assert found.first_difference.head in ("signal head 0 of group 0", "signal head 1 of group 0")


def test_models_of_other_depth_are_compared_by_logits_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "deeper", layers=5)
    found = compare(pair[0], tmp_path / "deeper", TOKENS)
    assert (found.equivalent, found.parts) == (False, ())
    assert found.parts_not_compared is not None
    assert found.parts_not_compared.endswith("no whole factors lead from layers 3 to 5")
    # The same function: two more layers that add nothing.
    shutil.copytree(pair[0], tmp_path / "padded")
    tensors = load_file(pair[0] / "model.safetensors")
    for name, tensor in list(tensors.items()):
        for layer in (3, 4):
            if ".layers.2." in name:
                added = tensor * 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else tensor.clone()
                tensors[name.replace(".2.", f".{layer}.")] = added
    save_file(tensors, tmp_path / "padded" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((pair[0] / "config.json").read_text())
    (tmp_path / "padded" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    for order in ((pair[0], tmp_path / "padded"), (tmp_path / "padded", pair[0])):
        found = compare(*order, TOKENS)
        assert found.equivalent
        assert found.max_rel < found.tolerance / 3


def test_logits_that_are_all_zero_cannot_be_compared_with(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers=1)
    edit(tmp_path, "lm_head.weight", 0.0)
    with pytest.raises(CompareError, match="not finite, or all zero"):
        compare(tmp_path, tmp_path, TOKENS)


def test_a_part_that_is_zero_everywhere_agrees_with_zero_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", layers=1)
    edit(tmp_path / "source", "model.layers.0.mlp.down_proj.weight", 0.0)
    grow(tmp_path / "source", tmp_path / "grown", {"ffn": 2})
    assert compare(tmp_path / "source", tmp_path / "grown", TOKENS).first_difference is None
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e-3
    save_file(tensors, tmp_path / "grown" / "model.safetensors", metadata={"format": "pt"})
    first = compare(tmp_path / "source", tmp_path / "grown", TOKENS).first_difference
    assert first is not None
    assert (first.part, first.tolerance) == ("mlp", 0.0)


def test_a_tolerance_that_says_nothing_is_no_verdict_on_a_part(tmp_path: Path) -> None:
    """In bfloat16 a model of such weights is beyond recognition; its parts are not said to differ."""
    write_checkpoint(tmp_path / "source", layers=6, scale=1.0, dtype=torch.float32)
    grow(tmp_path / "source", tmp_path / "grown", {"uniform": 2})
    found = compare(tmp_path / "source", tmp_path / "grown", TOKENS, dtype=torch.bfloat16)
    assert found.first_difference is None
    assert max(part.tolerance for part in found.parts) > 0.1
    assert any(part.max_rel > part.tolerance for part in found.parts)
    assert found.rounds_weights
    assert not math.isnan(found.max_rel)
