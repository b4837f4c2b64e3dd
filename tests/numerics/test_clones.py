"""Clone similarity against loops over the copies that `growth.json` lists, and on copies known by hand."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdagrow.errors import CheckpointError, CompareError
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.verify import clones
from gdagrow.verify.clones import CloneSimilarity, clone_similarity
from tests.checkpoints import write_checkpoint
from tests.growths import RANDOM, grow, growths, reads_last_dim, recorded_maps, topologies

# Sums of up to 2**10 products, and a few roundings besides.
TOLERANCE = 2**12 * torch.finfo(torch.float64).eps

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

# Tensor, axis, written; to the mean cosine and distance and the same of each head.
Figures = dict[tuple[str, str, bool], tuple[float, float, dict[str, tuple[float, float]]]]


def place_of(name: str, dim: int, index: int, source: Mapping[str, Any]) -> tuple[str, str]:
    """The axis and the source's head that an old index belongs to, by the layout of the Motif checkpoints."""
    heads = source["num_attention_heads"]
    groups = source.get("num_noise_heads", heads // 2)
    width, ratio = source.get("head_dim", source["hidden_size"] // heads), heads // groups - 1
    kind = name.split(".")[-2]
    if kind == "q_proj" and dim == 0:
        group, head = divmod(index // width, ratio + 1)
        noise = head == ratio
        return (
            ("noise", f"noise head of group {group}") if noise else ("signal", f"signal head {head} of group {group}")
        )
    if kind in ("k_proj", "v_proj") and dim == 0:
        return "kv", f"KV group {index // (2 * width)}"
    if kind == "o_proj" and dim == 1:
        group, head = divmod(index // (2 * width), ratio)
        return "signal", f"signal head {head} of group {group}"
    of_ffn = (kind in ("gate_proj", "up_proj") and dim == 0) or (kind == "down_proj" and dim == 1)
    return ("ffn" if of_ffn else "hidden"), ""


def pairs_of(maps: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Each copy but the first of every old index: the old index, the number of the copy, and where both stand."""
    seen: dict[int, list[int]] = {}
    for new, old in enumerate(maps):
        places = seen.setdefault(old, [])
        if places:
            yield old, len(places), new, places[0]
        places.append(new)


def by_hand(
    tensors: Mapping[str, Tensor], maps_of: Callable[[str], tuple[list[int], ...]], source: Mapping[str, Any]
) -> Figures:
    found: Figures = {}
    for name, tensor in tensors.items():
        for dim, maps in enumerate(maps_of(name)):
            chosen: dict[str, dict[tuple[str, int], list[tuple[int, int]]]] = {}
            for old, number, new, first in pairs_of(maps):
                axis, head = place_of(name, dim, old, source)
                chosen.setdefault(axis, {}).setdefault((head, number), []).append((new, first))
            for axis, copies in chosen.items():
                values = {key: likeness(tensor, dim, places) for key, places in copies.items()}
                heads: dict[str, list[tuple[float, float]]] = {}
                for (head, _), value in values.items():
                    heads.setdefault(head, []).append(value)
                last = dim == tensor.dim() - 1
                tied = "lm_head.weight" not in tensors
                written = not (last and reads_last_dim(name, tied=tied))
                means = {head: (fmean(v[0] for v in each), fmean(v[1] for v in each)) for head, each in heads.items()}
                found[name, axis, written] = (
                    fmean(v[0] for v in values.values()), fmean(v[1] for v in values.values()),
                    {head: mean for head, mean in means.items() if head},
                )  # fmt: skip
    return found


def likeness(tensor: Tensor, dim: int, places: list[tuple[int, int]]) -> tuple[float, float]:
    new, first = (torch.tensor(indices) for indices in zip(*places, strict=True))
    other, one = (tensor.double().index_select(dim, indices).flatten() for indices in (new, first))
    cosine = one @ other / (one.norm() * other.norm())
    return float(cosine), float(2 * (one - other).norm() / (one.norm() + other.norm()))


def as_figures(tensors: tuple[CloneSimilarity, ...]) -> Figures:
    return {
        (t.name, t.axis, t.written): (
            t.cosine, t.relative_distance, {h.head: (h.cosine, h.relative_distance) for h in t.heads}
        )
        for t in tensors
    }  # fmt: skip


def require_same(found: Figures, expected: Figures) -> None:
    assert set(found) == set(expected)
    for key, (cosine, distance, heads) in expected.items():
        assert found[key][0] == pytest.approx(cosine, abs=TOLERANCE), key
        assert found[key][1] == pytest.approx(distance, rel=TOLERANCE, abs=TOLERANCE), key
        assert set(found[key][2]) == set(heads)
        for head, figures in heads.items():
            assert found[key][2][head] == pytest.approx(figures, rel=TOLERANCE, abs=TOLERANCE), (key, head)


def train(directory: Path, seed: int) -> dict[str, Tensor]:
    """Move every weight a little, as training does, each copy its own way."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor.double() + torch.randn(tensor.shape, generator=generator).double() * 0.1).to(tensor.dtype)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors")
    return tensors


@settings(RANDOM, max_examples=25)
@given(data=st.data())
def test_as_loops_over_the_copies_say(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    topology = data.draw(topologies())
    root = tmp_path_factory.mktemp("growth")
    config = write_checkpoint(root / "source", **topology)
    grow(root / "source", root / "grown", data.draw(growths(topology)))
    record = json.loads((root / "grown" / "growth.json").read_text())
    tensors = train(root / "grown", topology["seed"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clones, "CHUNK_WEIGHTS", data.draw(st.sampled_from([1, 30, 2**18])))
        patch.setattr(clones, "MAPPED_WEIGHTS", data.draw(st.sampled_from([1, 100, 2**22])))
        found = clone_similarity(root / "grown")
    assert found is not None
    require_same(as_figures(found.tensors), by_hand(tensors, lambda name: recorded_maps(record, config, name), config))


def test_growth_upon_growth_leads_back_to_the_first_source(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path / "a", groups=2, ratio=2, kv_groups=1, hidden=6, ffn=5)
    grow(tmp_path / "a", tmp_path / "b", {"signal": 2, "hidden": 2})
    train(tmp_path / "b", 0)
    grow(tmp_path / "b", tmp_path / "c", {"noise": 2, "ffn": 3, "signal": 2})
    between = json.loads((tmp_path / "b" / "config.json").read_text())
    first, second = (json.loads((tmp_path / which / "growth.json").read_text()) for which in "bc")
    tensors = train(tmp_path / "c", 1)

    def composed(name: str) -> tuple[list[int], ...]:
        pairs = zip(recorded_maps(first, config, name), recorded_maps(second, between, name), strict=True)
        return tuple([one[old] for old in other] for one, other in pairs)

    found = clone_similarity(tmp_path / "c")
    assert found is not None
    require_same(as_figures(found.tensors), by_hand(tensors, composed, config))
    heads = {h.head for t in found.tensors if t.parameter.endswith("q_proj.weight") for h in t.heads}
    assert heads == {f"signal head {j} of group {g}" for g in range(2) for j in range(2)} | {
        f"noise head of group {g}" for g in range(2)
    }


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", groups=2, ratio=2, kv_groups=2, hidden=30, ffn=70, dtype=torch.float32)
    grow(tmp_path / "source", tmp_path / "grown", {"uniform": 3})
    return tmp_path / "grown"


def edit(directory: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors[name])
    save_file(tensors, directory / "model.safetensors")


def test_copies_are_equal_after_growth_and_parts_differ_by_the_noise(grown: Path) -> None:
    found = clone_similarity(grown)
    assert found is not None
    assert found.lineage == str(grown / "growth.json")
    for tensor in found.tensors:
        figures = [(tensor.cosine, tensor.relative_distance)]
        figures += [(head.cosine, head.relative_distance) for head in tensor.heads]
        if tensor.written:
            assert set(figures) == {(1.0, 0.0)}
        else:
            # 40 dB is 1% of each part, in two parts; that the three sum to nothing makes them differ up to 3/2 more.
            assert all(0.01 < distance < 0.03 for _, distance in figures)
            # |a - b|^2 = 2 - 2 cos for vectors of one length.
            assert all(cosine == pytest.approx(1 - distance**2 / 2, abs=1e-4) for cosine, distance in figures)
    assert {t.axis for t in found.tensors if t.written} == {"signal", "noise", "kv", "hidden", "ffn"}
    assert {t.axis for t in found.tensors if not t.written} == {"signal", "hidden", "ffn"}
    assert not any("lambda" in t.name or "subln" in t.name or "act_fn" in t.name for t in found.tensors)
    assert json.loads(json.dumps(found.as_dict()))["tensors"][0]["layer"] is None


def test_a_copy_that_parts_is_seen_in_its_head_alone(grown: Path) -> None:
    # Signal head 0 of the last of six groups of three query heads of width 8.
    edit(grown, Q_PROJ, lambda weight: weight[15 * 8 : 16 * 8].neg_())
    found = clone_similarity(grown)
    assert found is not None
    by_axis = {t.axis: t for t in found.tensors if t.name == Q_PROJ and t.written}
    record = json.loads((grown / "growth.json").read_text())["lineage"]["signal_heads"]
    group, head = record[5][0]
    parted = {h.head: (h.cosine, h.relative_distance) for h in by_axis["signal"].heads if h.relative_distance}
    # Two copies beside the first, one of them opposite: the means of 1 and -1, 0 and 2; in all four heads of eight.
    assert parted == {f"signal head {head} of group {group}": (0.0, 1.0)}
    assert (by_axis["signal"].cosine, by_axis["signal"].relative_distance) == (0.75, 0.25)
    assert (by_axis["noise"].cosine, by_axis["noise"].relative_distance) == (1.0, 0.0)


def test_a_copy_of_nothing_has_no_direction(grown: Path) -> None:
    edit(grown, "model.norm.weight", lambda weight: weight[30:].zero_())
    found = clone_similarity(grown)
    assert found is not None
    (norm,) = (t for t in found.tensors if t.name == "model.norm.weight")
    assert (norm.cosine, norm.relative_distance) == (0.0, 2.0)


def test_a_checkpoint_that_nothing_says_was_grown(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    assert clone_similarity(tmp_path / "m") is None


def test_the_lineage_may_lie_elsewhere(grown: Path, tmp_path: Path) -> None:
    expected = clone_similarity(grown)
    assert expected is not None
    (tmp_path / "kept").mkdir()
    (grown / "growth.json").rename(tmp_path / "kept" / "growth.json")
    assert clone_similarity(grown) is None
    shutil.copy(tmp_path / "kept" / "growth.json", tmp_path / "mine.json")
    for lineage, path in ((tmp_path / "kept", tmp_path / "kept" / "growth.json"), (tmp_path / "mine.json",) * 2):
        found = clone_similarity(grown, lineage=lineage)
        assert found is not None
        assert (found.lineage, found.tensors) == (str(path), expected.tensors)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda record: record["lineage"]["kv_groups"].pop(), "kv_groups: expected 6 entries, got 5; it is not the"),
        (lambda record: record["lineage"].pop("ffn"), "expected the lineage of a growth, got something else"),
        (lambda record: record["lineage"]["hidden"].pop(), "expected runs of 90 old features in all, got 60"),
        (lambda record: record["history"].append({}), "expected the lineage of a growth, got something else"),
        (lambda record: record.pop("history"), "expected the record of an earlier growth"),
    ],
)
def test_a_lineage_that_is_none(spoil: Callable[[Any], Any], sentence: str, grown: Path, tmp_path: Path) -> None:
    record = json.loads((grown / "growth.json").read_text())
    spoil(record)
    (tmp_path / "other.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"other\.json: .*" + sentence):
        clone_similarity(grown, lineage=tmp_path / "other.json")


def test_a_lineage_of_other_sizes_or_none_at_all(grown: Path, tmp_path: Path) -> None:
    grow(tmp_path / "source", tmp_path / "other", {"signal": 2})
    with pytest.raises(
        CheckpointError, match=r"6 groups of 2:1 on 6 KV groups, hidden 90, FFN 210, 2 layers: give the growth"
    ):
        clone_similarity(grown, lineage=tmp_path / "other")
    for nowhere in (tmp_path / "nowhere.json", tmp_path / "source"):
        with pytest.raises(CheckpointError, match=r"no such file; give a growth\.json or a directory"):
            clone_similarity(grown, lineage=nowhere)


def test_weights_that_are_not_finite_are_refused_by_name(grown: Path) -> None:
    edit(grown, Q_PROJ, lambda weight: weight[0].fill_(inf))
    with pytest.raises(CompareError, match=f"{Q_PROJ} has copies with weights that are not finite"):
        clone_similarity(grown)


def test_no_more_rows_are_read_at_a_time_than_the_bounds_say(grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clones, "CHUNK_WEIGHTS", 200)
    monkeypatch.setattr(clones, "MAPPED_WEIGHTS", 500)
    sizes: list[int] = []
    read = TensorReader.rows

    def counted(*arguments: Any) -> Tensor:
        rows = read(*arguments)
        sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(TensorReader, "rows", counted)
    clone_similarity(grown)
    assert 300 < max(sizes) <= 500
