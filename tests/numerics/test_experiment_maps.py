"""Figures of attention maps: standard attention against maps known by hand and `transformers`' own in float64."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gdagrow.errors import CheckpointError, CompareError
from gdagrow.experiment.maps import measure_maps
from gdagrow.verify import attention
from gdagrow.verify.attention import attention_stats
from gdagrow.verify.tokens import random_tokens
from tests.checkpoints import write_checkpoint

KEYS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "initializer_range": 0.3,
}  # fmt: skip
# Roundings of float32 that may reach a figure, as tests/numerics/test_attention_stats.py counts them.
TOLERANCE = 2**12 * 2**-23


def write_llama(directory: Path, **scaled: float) -> Any:
    """A small model with weights of the names given scaled; returns it in float64."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**KEYS, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        parameter.data *= next((factor for part, factor in scaled.items() if part in name), 1.0)
    model.save_pretrained(directory)
    return model.double().eval()


def visible_rows(maps: Tensor) -> list[Tensor]:
    """The rows of maps `[sequences, heads, length, length]` that count, each as far as it sees."""
    length = maps.shape[-1]
    first = 19 if length > 20 else 0
    return [row[query, : query + 1] for row in maps.flatten(0, 1) for query in range(first, length)]


@pytest.mark.parametrize(("seqs", "length"), [(2, 48), (1, 12)])
def test_standard_attention_as_transformers_makes_it(
    seqs: int, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_WEIGHTS", 2**10)  # several blocks of queries
    model, tokens = write_llama(tmp_path / "state"), random_tokens(64, seqs=seqs, length=length, seed=0)
    with torch.no_grad():
        maps = model(input_ids=tokens, output_attentions=True).attentions
    found = measure_maps(tmp_path / "state", tokens)
    assert len(found) == 2
    for layer, of_layer in zip(found, maps, strict=True):
        rows = visible_rows(of_layer)
        entropy = fmean(float(torch.special.entr(row).sum()) for row in rows)
        top = fmean(float(row.sort(descending=True).values[: math.ceil(len(row) / 20)].sum()) for row in rows)
        expected = {
            "signal_entropy": entropy, "signal_top_5_percent": top, "difference_entropy": entropy,
            "difference_top_5_percent": top, "difference_negative": 0.0, "lambda": 0.0,
        }  # fmt: skip
        assert layer == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert found[0]["signal_entropy"] < math.log(length) - 0.3, "not all alike"


def test_maps_that_are_even(tmp_path: Path) -> None:
    """Queries of zero see all positions alike."""
    write_llama(tmp_path / "state", q_proj=0.0)
    for layer in measure_maps(tmp_path / "state", random_tokens(64, seqs=1, length=40, seed=0)):
        seen = range(20, 41)
        assert layer["signal_entropy"] == pytest.approx(fmean(math.log(n) for n in seen), abs=TOLERANCE)
        assert layer["signal_top_5_percent"] == pytest.approx(fmean(-(-n // 20) / n for n in seen), abs=TOLERANCE)


def test_differential_attention_as_stats_has_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "state", groups=2, ratio=3, kv_groups=1)
    tokens = random_tokens(50, seqs=2, length=24, seed=0)
    found = measure_maps(tmp_path / "state", tokens)
    stats = attention_stats(tmp_path / "state", tokens).layers
    for layer, of_layer in zip(found, stats, strict=True):
        assert layer == {
            "signal_entropy": fmean(of_layer.signal.entropy),
            "signal_top_5_percent": fmean(of_layer.signal.top_5_percent),
            "noise_entropy": fmean(of_layer.noise.entropy),
            "noise_top_5_percent": fmean(of_layer.noise.top_5_percent),
            "difference_entropy": fmean(of_layer.difference.entropy),
            "difference_top_5_percent": fmean(of_layer.difference.top_5_percent),
            "difference_negative": fmean(of_layer.difference.negative or ()),
            "lambda": of_layer.lambda_,
        }
    assert found[0]["difference_negative"] > 0


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    tokens = random_tokens(64, seqs=1, length=24, seed=0)
    write_llama(tmp_path / "state", q_proj=math.nan)
    with pytest.raises(CompareError, match="state: attention maps are not finite, so there is nothing to measure"):
        measure_maps(tmp_path / "state", tokens)
    write_llama(tmp_path / "cut")
    config = (tmp_path / "cut" / "config.json").read_text()
    (tmp_path / "cut" / "config.json").write_text(config.replace('"head_dim": 8', '"head_dim": 16'))
    with pytest.raises(CheckpointError, match=r"8 tensors do not fit the llama table .*q_proj\.weight has shape"):
        measure_maps(tmp_path / "cut", tokens)
