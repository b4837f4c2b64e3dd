"""The model in `transformers`: logits, gradients, loss, padding, caches and attention maps against the reference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from gdagrow.engine import grow_moment
from gdagrow.models.gda import GdaModel
from gdagrow.models.hf import MotifConfig, MotifForCausalLM
from tests.checkpoints import write_checkpoint
from tests.growths import EPS, RANDOM, grow
from tests.numerics.test_gda_model import CONFIG, FLOAT64_TOLERANCE, Case, cases, relative_error
from tests.reference import reference_logits, reference_maps

# As in test_gradients.py: float64 rounding through forward and backward, and of gradients that are zero on paper.
GRADIENT_TOLERANCE, ROUNDING = 1e-9, 1e-13
# Logits of two models, or of one in another order of the same sums: float64 eps over some thousand operations.
SAME = 1e-11


def wrapped(model: GdaModel, config: Mapping[str, Any], bias: frozenset[str] = frozenset()) -> MotifForCausalLM:
    """The same parameters in transformers' model."""
    result = MotifForCausalLM(MotifConfig(**config, use_cache=False), bias).double()
    missing, unexpected = result.load_state_dict(model.state_dict(), strict=False)
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    assert unexpected == []
    return result.eval()


def example(batch: int = 2, positions: int = 9, **keys: Any) -> tuple[GdaModel, MotifForCausalLM, Tensor]:
    case = Case({**CONFIG, **keys}, frozenset(), batch=batch, positions=positions, seed=11)
    model = case.model()
    return model, wrapped(model, case.config), case.ids()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@settings(RANDOM, max_examples=15)
@given(case=cases())
def test_logits_are_those_of_the_reference(case: Case, kernel: str) -> None:
    model = wrapped(case.model(), case.config, case.bias)
    model.set_attn_implementation(kernel)
    expected = reference_logits(case.model().state_dict(), case.config, case.ids())
    assert relative_error(model(case.ids()).logits, expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_loss_and_gradients_are_the_reference_models(kernel: str, checkpointing: dict[str, bool] | None) -> None:
    reference, model, ids = example()
    labels = ids.clone()
    labels[0, :4] = -100
    model.set_attn_implementation(kernel)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    expected, found = reference(ids, labels).loss, model(ids, labels=labels).loss
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    expected.backward()
    found.backward()
    parameters = dict(model.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in reference.parameters())
    for name, parameter in reference.named_parameters():
        difference = float((parameters[name].grad - parameter.grad).abs().max())
        assert difference < 10 * FLOAT64_TOLERANCE * largest, name


def test_checkpointing_computes_layers_again() -> None:
    _, model, ids = example()
    model.train()
    calls: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


def test_the_loss_of_a_part_of_a_batch_sums_to_that_of_the_whole() -> None:
    """What the Trainer's gradient accumulation asks for: all parts are divided by the labels of the whole batch."""
    _, model, ids = example(batch=3)
    labels = ids.clone()
    labels[0, 2:] = -100
    whole = model(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    for items in (count, int(count)):
        parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(3)]
        assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-14)


def padded(ids: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """The first `lengths` tokens of each row, padded with token 0, and the mask of real ones."""
    width = max(lengths)
    batch, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, None) if side == "left" else slice(length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    return batch, mask


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(kernel: str, side: str) -> None:
    _, model, ids = example(batch=3)
    model.set_attn_implementation(kernel)
    lengths = [9, 4, 1]
    batch, mask = padded(ids, lengths, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(batch, attention_mask=mask, position_ids=positions).logits
    assert found.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits[0]
        assert relative_error(found[row][mask[row].bool()], alone) < SAME


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_do_not_come_from_padding(kernel: str, side: str) -> None:
    reference, model, ids = example(batch=2)
    model.set_attn_implementation(kernel)
    model.train()
    lengths = [9, 4]
    batch, mask = padded(ids, lengths, side)
    # Nor does a label of what padding predicts.
    is_first = mask.cumsum(1) == 1
    labels = batch.masked_fill((mask == 0) | is_first, -100)
    model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), labels=labels).loss.backward()
    alone = [
        reference(ids[row : row + 1, :length], ids[row : row + 1, :length]).loss for row, length in enumerate(lengths)
    ]
    ((8 * alone[0] + 3 * alone[1]) / 11).backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in reference.parameters())
    for name, parameter in reference.named_parameters():
        difference = float((model.get_parameter(name).grad - parameter.grad).abs().max())
        assert difference < 10 * FLOAT64_TOLERANCE * largest, name


def greedy(model: GdaModel, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_decoding_is_the_reference_models(kernel: str, tied: bool) -> None:
    reference, model, ids = example(batch=2, positions=5, tie_word_embeddings=tied)
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        expected = greedy(reference, ids, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert len(set(expected.flatten().tolist())) > 5, "a model that repeats itself would hide a stale cache"
    for cache in ({"use_cache": False}, {"use_cache": True}, {"use_cache": True, "cache_implementation": "static"}):
        assert model.generate(ids, **options, **cache).tolist() == expected.tolist(), cache


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_left_padded_generation_is_the_unpadded(kernel: str) -> None:
    _, model, ids = example(batch=3, positions=7)
    model.set_attn_implementation(kernel)
    lengths = [7, 3, 1]
    batch, mask = padded(ids, lengths, "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    found = model.generate(batch, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, :length], **options)
        assert found[row, 7:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("cache_of", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=20)])
def test_pieces_of_a_text_through_a_cache_are_the_whole_text(cache_of: Any) -> None:
    _, model, ids = example(batch=2, positions=12)
    cache = cache_of(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 1, 3, 1, 2], 1)]
    assert int(cache.get_seq_length()) == 12
    assert relative_error(torch.cat(pieces, 1), whole) < SAME
    assert cache.layers[0].keys.shape[1] == cache.layers[0].values.shape[1] == CONFIG["num_key_value_heads"]


def test_sequences_that_are_packed_do_not_see_each_other() -> None:
    _, model, ids = example(batch=1, positions=9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    together = model(ids, position_ids=positions).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    assert relative_error(together, apart) < SAME


def test_positions_that_are_given_count() -> None:
    """Every other token hidden, or only the others given at their places: RoPE sees the same distances."""
    _, model, ids = example(batch=1, positions=9)
    is_shown = torch.arange(9) % 2 == 0
    hidden = model(ids, attention_mask=is_shown[None].long()).logits[:, is_shown]
    # Without a mask, positions that leap would begin a new sequence.
    given = model(ids[:, is_shown], torch.ones(1, 5), position_ids=torch.arange(0, 9, 2)[None]).logits
    assert relative_error(given, hidden) < SAME
    assert relative_error(model(ids[:, is_shown]).logits, hidden) > 1e-3


def test_a_cache_is_made_where_the_config_says_so_but_not_in_training() -> None:
    _, model, ids = example()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 9
    model.config.use_cache = True
    assert model(ids).past_key_values.get_seq_length() == 9
    model.train()
    assert model(ids).past_key_values is None


def test_only_the_logits_that_are_asked_for() -> None:
    _, model, ids = example()
    whole = model(ids).logits
    assert relative_error(model(ids, logits_to_keep=1).logits, whole[:, -1:]) < SAME
    assert relative_error(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]]) < SAME


def test_attention_maps_are_those_of_the_reference_in_the_order_of_query_heads() -> None:
    reference, model, ids = example(batch=1)
    with pytest.raises(ValueError, match="attn_implementation='eager' to have output_attentions"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(1, 9, 24)] * 3
    ratio = CONFIG["num_attention_heads"] // CONFIG["num_noise_heads"] - 1
    maps = reference_maps(reference.state_dict(), CONFIG, ids[0])
    for found, layer in zip(outputs.attentions, maps, strict=True):
        expected = []
        for group, noise in enumerate(layer.noise):
            expected += [*layer.signal[group * ratio : (group + 1) * ratio], noise]
        assert relative_error(found[0], torch.stack(expected)) < SAME
    assert isinstance(model(ids, return_dict=False)[0], Tensor)


def test_bf16_stays_near_float64() -> None:
    """As test_gda_model.py has it for the reference model, whose layers these are."""
    _, high, ids = example(batch=2, positions=17)
    _, low, _ = example(batch=2, positions=17)
    low.bfloat16()
    high.load_state_dict(low.state_dict())
    low.set_attn_implementation("eager")
    for _ in range(2):
        logits = low(ids).logits
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits, high(ids).logits) < 10 * torch.finfo(torch.bfloat16).eps
        low.set_attn_implementation("sdpa")


def test_new_weights_are_those_of_training_from_scratch() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MotifConfig(**CONFIG, hidden_dropout=0.0))
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if ".lambda_" in name:
            assert 0 < float(tensor.abs().max()) < 1, name
        elif tensor.dim() == 2:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.2), name
        else:
            assert tensor.tolist() == pytest.approx(
                [1 / 3 if "act_fn.weight" in name else 0 if "bias" in name else 1] * len(tensor)
            ), name


def gradients(directory: Path, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    return outputs.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", [{"signal": 2}, {"uniform": 2}], ids=["signal x2", "uniform x2"])
def test_grown_is_source_through_transformers(tmp_path: Path, recipe: dict[str, int], tied: bool) -> None:
    """Logits to float64 accuracy, gradients by the mirror rule: an upcast to float32 anywhere would show."""
    write_checkpoint(tmp_path / "source", dtype=torch.float64, tied=tied, extra=EPS)
    grown = grow(tmp_path / "source", tmp_path / "grown", {**recipe, "exact_copies": True})
    ids = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(3))
    logits, before = gradients(tmp_path / "source", ids)
    grown_logits, after = gradients(tmp_path / "grown", ids)
    assert relative_error(grown_logits, logits) < SAME
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    assert after.keys() == {tensor.name for tensor in grown.plan.tensors}
    for tensor in grown.plan.tensors:
        if tensor.moments_lost:
            continue
        expected = grow_moment(tensor.growth, before[tensor.source.name], 1)
        scale = float(expected.abs().max()) + ROUNDING / GRADIENT_TOLERANCE * largest
        assert float((after[tensor.name] - expected).abs().max()) < GRADIENT_TOLERANCE * scale, tensor.name
