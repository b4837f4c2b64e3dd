"""Attention statistics against loops over the full maps of the second model, and against maps known by hand."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdagrow.errors import CompareError
from gdagrow.models.layers import GdaAttention, lambda_init
from gdagrow.verify import attention
from gdagrow.verify.attention import AttentionStats, MapStats, attention_stats
from gdagrow.verify.tokens import random_tokens
from tests.checkpoints import write_checkpoint
from tests.growths import EPS, RANDOM, topologies
from tests.reference import LayerMaps, reference_maps

# Roundings that may reach a figure: sums of up to 2**6 terms in up to 2**3 halves of layers, and scores of up to 2**3
# whose error softmax makes a relative one.
ROUNDINGS = 2**12


def measured_by_hand(rows: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Entropy, top 1%, top 5% and negative share of one head, means over the visible weights of each query."""
    entropies, ones, fives, negatives = [], [], [], []
    for row in rows:
        mass = sorted((abs(weight) for weight in row), reverse=True)
        total = sum(mass)
        entropies.append(-sum(m / total * math.log(m / total) for m in mass if m))
        ones.append(sum(mass[: math.ceil(len(row) / 100)]) / total)
        fives.append(sum(mass[: math.ceil(len(row) / 20)]) / total)
        negatives.append(sum(weight < 0 for weight in row) / len(row))
    return fmean(entropies), fmean(ones), fmean(fives), fmean(negatives)


def by_hand(sequences: list[list[LayerMaps]], layer: int, kind: str) -> list[tuple[float, float, float, float]]:
    """What `measured_by_hand` says of each head of a layer."""
    maps = [sequence[layer] for sequence in sequences]
    length = len(maps[0].noise[0])
    first = 19 if length > 20 else 0
    found = []
    for head in range(len(maps[0].noise if kind == "noise" else maps[0].signal)):
        rows = []
        for of_sequence in maps:
            ratio = len(of_sequence.signal) // len(of_sequence.noise)
            for query in range(first, length):
                signal = of_sequence.signal[head][query].tolist() if kind != "noise" else []
                noise = of_sequence.noise[head if kind == "noise" else head // ratio][query].tolist()
                row = {
                    "signal": signal,
                    "noise": noise,
                    "difference": [s - of_sequence.lambda_ * n for s, n in zip(signal, noise, strict=False)],
                }[kind]
                rows.append(row[: query + 1])
        found.append(measured_by_hand(rows))
    return found


def columns(stats: MapStats) -> list[tuple[float, ...]]:
    """The figures, one tuple a head."""
    negative = stats.negative or (0.0,) * len(stats.entropy)
    return list(zip(stats.entropy, stats.top_1_percent, stats.top_5_percent, negative, strict=True))


def require_close(found: AttentionStats, directory: Path, config: dict[str, Any], tokens: Tensor, eps: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    sequences = [reference_maps(tensors, config, ids) for ids in tokens]
    assert len(found.layers) == config["num_hidden_layers"]
    for layer in found.layers:
        assert layer.lambda_ == pytest.approx(sequences[0][layer.layer].lambda_, rel=0, abs=ROUNDINGS * eps)
        assert layer.lambda_init == lambda_init(layer.layer)
        for kind in ("signal", "noise", "difference"):
            expected = by_hand(sequences, layer.layer, kind)
            actual = columns(getattr(layer, kind))
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                assert one == pytest.approx(other, rel=0, abs=ROUNDINGS * eps), (layer.layer, kind)


@settings(RANDOM, max_examples=25)
@given(data=st.data())
def test_as_loops_over_the_whole_maps_say(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    topology = data.draw(topologies())
    length, block = data.draw(st.sampled_from([1, 7, 20, 21, 26])), data.draw(st.sampled_from([1, 100, 2**18]))
    directory = tmp_path_factory.mktemp("model")
    config = write_checkpoint(directory, **topology)
    tokens = random_tokens(config["vocab_size"], seqs=2, length=length, seed=topology["seed"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_WEIGHTS", block)
        found = attention_stats(directory, tokens, dtype=torch.float64)
    heads = (topology["groups"], topology["ratio"])
    assert (found.num_sequences, found.length, found.dtype) == (2, length, "float64")
    assert (found.num_groups, found.ratio) == heads
    require_close(found, directory, config, tokens, torch.finfo(torch.float64).eps)


def test_float32_is_as_good_as_float32_can_be(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path, groups=2, ratio=2, dtype=torch.float32, extra=EPS)
    tokens = random_tokens(config["vocab_size"], seqs=1, length=30, seed=0)
    found = attention_stats(tmp_path, tokens)
    assert found.dtype == "float32"
    require_close(found, tmp_path, config, tokens, torch.finfo(torch.float32).eps)


def edit(directory: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")


def uniform(directory: Path, lambda_: float) -> None:
    """Make every map uniform, by queries of zero, and lambda of layer 0 what is given."""
    above = math.log(lambda_ - lambda_init(0) + 1)  # exp(q1 . k1) = above, exp(q2 . k2) = 1

    def change(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("q_proj.weight"):
            return torch.zeros_like(tensor)
        if name.startswith("model.layers.0.self_attn.lambda_"):
            one = torch.zeros_like(tensor)
            one[0] = above if name.endswith("q1") else float(name.endswith("k1"))
            return one
        return tensor

    edit(directory, change)


@pytest.mark.parametrize(("lambda_", "negative"), [(0.5, 0.0), (40.0, 1.0)])
def test_uniform_attention_is_known(lambda_: float, negative: float, tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path, dtype=torch.float64, layers=1)
    uniform(tmp_path, lambda_)
    length = 130
    (layer,) = attention_stats(
        tmp_path, random_tokens(config["vocab_size"], seqs=2, length=length, seed=0), dtype=torch.float64
    ).layers
    visible = range(20, length + 1)
    expected = (
        fmean(math.log(v) for v in visible),
        fmean((1 if v <= 100 else 2) / v for v in visible),
        fmean(-(-v // 20) / v for v in visible),
    )
    assert layer.lambda_ == pytest.approx(lambda_, rel=1e-14)
    for stats in (layer.signal, layer.noise, layer.difference):
        for figures in columns(stats):
            assert figures[:3] == pytest.approx(expected, rel=0, abs=length * 2**-52)
    assert layer.difference.negative == (negative,) * 6
    assert layer.signal.negative is layer.noise.negative is None


def test_a_difference_of_nothing_counts_as_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_checkpoint(tmp_path, dtype=torch.float64, layers=1)
    uniform(tmp_path, 0.5)
    monkeypatch.setattr(GdaAttention, "current_lambda", lambda _, dtype: torch.ones((), dtype=dtype))
    tokens = random_tokens(config["vocab_size"], seqs=1, length=3, seed=0)
    (layer,) = attention_stats(tmp_path, tokens, dtype=torch.float64).layers
    assert layer.difference.entropy == pytest.approx([(math.log(2) + math.log(3)) / 3] * 6, rel=1e-14)
    assert layer.difference.top_5_percent == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3] * 6, rel=1e-14)
    assert layer.difference.negative == (0.0,) * 6


@pytest.mark.parametrize("spoilt", ["k_proj.weight", "lambda_k1"])
def test_what_is_not_finite_is_told_by_its_layer(spoilt: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers=2)
    edit(tmp_path, lambda name, tensor: tensor * math.inf if name.endswith(f"layers.1.self_attn.{spoilt}") else tensor)
    with pytest.raises(CompareError, match="the attention of layer 1 is not finite"):
        attention_stats(tmp_path, random_tokens(61, seqs=1, length=4, seed=0))


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return made


def test_no_tensor_of_maps_is_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of maps with 490,000 weights each, what is made to measure them holds no more than a block."""
    write_checkpoint(tmp_path, groups=2, ratio=3, head_dim=2, hidden=4, ffn=4, vocab=7, layers=1)
    monkeypatch.setattr(attention, "BLOCK_WEIGHTS", 2**14)
    watching, measure = Largest(), attention._layer_stats

    def watched(*arguments: Any) -> Any:
        with watching:
            return measure(*arguments)

    monkeypatch.setattr(attention, "_layer_stats", watched)
    attention_stats(tmp_path, random_tokens(7, seqs=1, length=700, seed=0))
    assert 2**13 < watching.num_elements <= 2**14


@pytest.mark.parametrize("length", [1, 19, 20, 21, 22, 1000, 16384])
@pytest.mark.parametrize("ratio", [1, 4, 512])
def test_blocks_cover_every_measured_query_once(length: int, ratio: int) -> None:
    blocks = list(attention.query_blocks(length, ratio))
    assert [query for block in blocks for query in block] == list(range(19 if length > 20 else 0, length))
    assert all(len(block) == 1 or len(block) * ratio * length <= attention.BLOCK_WEIGHTS for block in blocks)
