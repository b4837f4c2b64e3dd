"""Wrong growths: each is caught by the certificate, which names the tensor and head, and by running both models."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gdagrow.errors import CheckpointError, CompareError
from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.output import weights_output
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from gdagrow.verify import tensors
from gdagrow.verify.logits import compare
from gdagrow.verify.tokens import random_tokens
from gdagrow.verify.weights import check_weights
from tests.checkpoints import edit, edit_json, write_checkpoint
from tests.growths import grow

Tensors = dict[str, Tensor]

TOKENS = random_tokens(61, seqs=2, length=16, seed=0)
A, M = "model.layers.1.self_attn.", "model.layers.0.mlp."
# Of the source: 2 groups of 3:1 on 1 KV group, hidden 32, FFN 48; grown by RECIPE to 4 groups of 3:1 on 2 KV groups.
D, HIDDEN, FFN = 8, 32, 48
RECIPE = {"signal": 2, "noise": 2, "kv": 2, "hidden": 2, "ffn": 3}
Q_HEADS = 4  # query heads to a group


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("right")
    write_checkpoint(directory / "source", tied=request.param, bias=True, lambda_dtype=torch.float32)
    grow(directory / "source", directory / "grown", RECIPE)
    return directory


@pytest.fixture
def pair(right: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(right / "grown", tmp_path / "grown")
    return right / "source", tmp_path / "grown"


def heads(tensor: Tensor, width: int = D) -> Tensor:
    """A tensor with its rows taken head by head."""
    return tensor.view(-1, width, *tensor.shape[1:])


def swap(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def one_ulp(tensor: Tensor, row: int, column: int) -> None:
    tensor.view(torch.int16)[row, column] += 1


def copy_outside_its_group(t: Tensors) -> None:
    heads(t[A + "q_proj.weight"])[0] = heads(t[A + "q_proj.weight"])[Q_HEADS]


def noise_head_of_another_group(t: Tensors) -> None:
    heads(t[A + "q_proj.weight"])[3] = heads(t[A + "q_proj.weight"])[Q_HEADS + 3]


def undivided_columns(t: Tensors) -> None:
    t[M + "down_proj.weight"] *= 3


def undivided_heads(t: Tensors) -> None:
    t[A + "o_proj.weight"] *= 2


def swapped_value_halves(t: Tensors) -> None:
    values = heads(t[A + "v_proj.weight"])
    swap(values[2], values[3])


def swapped_keys_of_one_copy(t: Tensors) -> None:
    keys = heads(t[A + "k_proj.weight"])
    swap(keys[2], keys[3])


def one_part_one_ulp_off(t: Tensors) -> None:
    one_ulp(t[A + "o_proj.weight"], 5, 2 * D * 7 + 1)


def one_copy_one_ulp_off(t: Tensors) -> None:
    one_ulp(t[M + "up_proj.weight"], FFN + 7, 3)


def lambda_changed(t: Tensors) -> None:
    t[A + "lambda_q1"][2] *= 1.5


def subln_changed(t: Tensors) -> None:
    t[A + "subln.weight"][11] *= 2


def norm_not_gathered(t: Tensors) -> None:
    t["model.layers.0.input_layernorm.weight"][HIDDEN:] = 1.0


def tied_norm_not_split(t: Tensors) -> None:
    t["model.norm.weight"] *= 2


def embedding_rows_swapped(t: Tensors) -> None:
    rows = t["model.embed_tokens.weight"]
    swap(rows[4], rows[9])


def bias_wrong(t: Tensors) -> None:
    t[A + "q_proj.bias"].view(-1, D)[2 * Q_HEADS + 1] += 1


def written_bias_divided(t: Tensors) -> None:
    t[M + "down_proj.bias"] /= 3


def part_lost(t: Tensors) -> None:
    t[M + "gate_proj.weight"][:, HIDDEN:] = 0


def not_finite(t: Tensors) -> None:
    t[M + "act_fn.weight"][1] = torch.nan


FIRST_HEADS = (*(f"signal head {j} of group 0" for j in range(3)), "signal head 0 of group 1")

# The first part that `compare` names: layer, part, and a pattern of the head; nothing where it is behind all layers.
Part = tuple[int | None, str, str] | None
ANY_HEAD, OF_KV_GROUP_1 = "signal head . of group .", "signal head . of group [23]"

# What is done, the tensor that is named and its heads, in order of rows or columns, and the first part that is wrong.
MUTATIONS: tuple[tuple[Callable[[Tensors], None], str, tuple[str, ...], Part], ...] = (
    (copy_outside_its_group, A + "q_proj.weight", ("signal head 0 of group 0",),
     (1, "signal heads", "signal head 0 of group 0")),
    (noise_head_of_another_group, A + "q_proj.weight", ("noise head of group 0",),
     (1, "noise heads", "noise head of group 0")),
    (undivided_columns, M + "down_proj.weight", (), (0, "mlp", "None")),
    (undivided_heads, A + "o_proj.weight", FIRST_HEADS, (1, "attention", ANY_HEAD + " of the source")),
    (swapped_value_halves, A + "v_proj.weight", ("KV group 1",), (1, "signal heads", OF_KV_GROUP_1)),
    (swapped_keys_of_one_copy, A + "k_proj.weight", ("KV group 1",), (1, "signal heads", OF_KV_GROUP_1)),
    (one_part_one_ulp_off, A + "o_proj.weight", ("signal head 1 of group 0",),
     (1, "attention", "signal head 1 of group 0 of the source")),
    (one_copy_one_ulp_off, M + "up_proj.weight", (), (0, "mlp", "None")),
    (lambda_changed, A + "lambda_q1", (), (1, "differences", ANY_HEAD)),
    (subln_changed, A + "subln.weight", (), (1, "differences", ANY_HEAD)),
    (norm_not_gathered, "model.layers.0.input_layernorm.weight", (), (0, "signal heads", ANY_HEAD)),
    (tied_norm_not_split, "model.norm.weight", (), None),
    (embedding_rows_swapped, "model.embed_tokens.weight", (), (None, "embedding", "None")),
    (bias_wrong, A + "q_proj.bias", ("signal head 1 of group 2",),
     (1, "signal heads", "signal head 1 of group 2")),
    (written_bias_divided, M + "down_proj.bias", (), (0, "mlp", "None")),
    (part_lost, M + "gate_proj.weight", (), (0, "mlp", "None")),
    (not_finite, M + "act_fn.weight", (), (0, "mlp", "None")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "name", "named", "part"), MUTATIONS, ids=[change.__name__ for change, *_ in MUTATIONS]
)
def test_a_wrong_growth_is_caught_and_named(
    change: Callable[[Tensors], None], name: str, named: tuple[str, ...], part: Part, pair: tuple[Path, Path]
) -> None:
    edit(pair[1], change)
    found = check_weights(*pair)
    assert not found.equivalent
    assert [difference.name for difference in found.differences] == [name]
    places = found.differences[0].places
    assert tuple(dict.fromkeys(place.head for place in places if place.head)) == named
    assert places
    assert found.differences[0].num_wrong > 0
    run = compare(*pair, TOKENS)
    assert not run.equivalent
    first = run.first_difference
    assert (first is None) == (part is None)
    if first and part:
        assert (first.layer, first.part) == part[:2]
        assert re.fullmatch(part[2], str(first.head))


@pytest.mark.parametrize("block_bytes", [1, 700])
def test_blocks_chunks_and_processes_are_no_matter(
    block_bytes: int, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(t: Tensors) -> None:
        for wrong, *_ in MUTATIONS:
            wrong(t)

    assert check_weights(*pair).equivalent
    edit(pair[1], change)
    found = check_weights(*pair)
    for name, num_bytes in (("_ALONE_BYTES", 0), ("_BLOCK_BYTES", block_bytes), ("_CHUNK_BYTES", 3 * block_bytes)):
        monkeypatch.setattr(tensors, name, num_bytes)
    again = check_weights(*pair)
    assert len(found.differences) >= 14
    for one, other in zip(found.differences, again.differences, strict=True):
        assert (one.name, one.num_wrong, one.largest) == (other.name, other.num_wrong, other.largest)
        assert {place.head for place in one.places} == {place.head for place in other.places}


def test_places_and_distances_are_right(pair: tuple[Path, Path]) -> None:
    """A copy in grown row 4 of q_proj comes from source row 4; a sum's place is that of its first part."""
    edit(pair[1], copy_outside_its_group)
    (difference,) = check_weights(*pair).differences
    queries = load_file(pair[0] / "model.safetensors")[A + "q_proj.weight"].double()
    apart = (queries[:D] - queries[Q_HEADS * D :][:D]).abs()
    parts = load_file(pair[1] / "model.safetensors")[A + "q_proj.weight"].double()[:D]
    sums = (parts[:, :HIDDEN] + parts[:, HIDDEN:] - queries[:D]).abs()
    assert difference.largest == float(sums.max()) == float(apart.max())
    assert difference.num_wrong == int((sums > 0).sum())
    assert (difference.places[0].row, difference.places[0].old_row, difference.places[0].column) == (0, 0, 0)
    edit(pair[1], one_copy_one_ulp_off)
    place = check_weights(*pair).differences[0].places[0]
    assert (place.row, place.old_row, place.column, place.old_column) == (FFN + 7, 7, 3, 3)


def test_every_copy_that_is_wrong_counts(pair: tuple[Path, Path]) -> None:
    edit(pair[1], part_lost)
    (difference,) = check_weights(*pair).differences
    assert difference.num_wrong == 3 * FFN * HIDDEN


def test_heads_with_one_copy_among_others_with_two(right: Path, tmp_path: Path) -> None:
    """At 4:1 from 3:1 only the first head of each group has two copies; the heads of a sum are the source's."""
    grow(right / "source", tmp_path / "grown", {"signal": "4:1"})

    def change(t: Tensors) -> None:
        one_ulp(t[A + "o_proj.weight"], 2, 2 * D * 5 + 1)

    assert check_weights(right / "source", tmp_path / "grown").equivalent
    edit(tmp_path / "grown", change)
    (difference,) = check_weights(right / "source", tmp_path / "grown").differences
    (place,) = difference.places
    assert (place.head, place.row, place.old_column) == ("signal head 1 of group 1", 2, 2 * D * 4 + 1)


def test_parts_of_a_head_may_be_swapped(pair: tuple[Path, Path]) -> None:
    """Which copy of a feature holds which part is no matter: it is the same function."""
    name = "lm_head.weight" if "lm_head.weight" in load_file(pair[1] / "model.safetensors") else A + "o_proj.weight"
    columns = HIDDEN if name.startswith("lm") else 2 * 6 * D

    def swapped(t: Tensors) -> None:
        swap(t[name][:, 3], t[name][:, columns + 3])

    edit(pair[1], swapped)
    assert check_weights(*pair).equivalent
    assert compare(*pair, TOKENS).equivalent


def test_other_noise_is_the_same_and_another_source_is_not(right: Path, tmp_path: Path) -> None:
    tied = json.loads((right / "source" / "config.json").read_text())["tie_word_embeddings"]
    grow(right / "source", tmp_path / "seed", RECIPE | {"seed": 99, "snr_db": 20.0})
    assert check_weights(right / "source", tmp_path / "seed").equivalent
    write_checkpoint(tmp_path / "other", tied=tied, bias=True, lambda_dtype=torch.float32, seed=1)
    found = check_weights(tmp_path / "other", right / "grown")
    assert len(found.differences) == found.num_tensors


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"rms_norm_eps": 1e-5}, ["rms_norm_eps"]), ({"attn_rms_norm_eps": 1e-6}, ["attn_rms_norm_eps"]),
     ({"rope_theta": 5e5}, ["rope_theta"]), ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling"]),
     ({"use_cache": False, "torch_dtype": "float32", "use_bias": False}, []),
     ({"rope_theta": 10000, "attn_rms_norm_eps": 1e-5}, [])],
)  # fmt: skip
def test_settings_that_change_the_function(keys: dict[str, Any], named: list[str], pair: tuple[Path, Path]) -> None:
    edit_json(pair[1] / "config.json", **keys)
    found = check_weights(*pair)
    assert found.differences == ()
    assert [setting.key for setting in found.settings] == named
    assert found.equivalent is (not named)
    if "rope_scaling" not in keys:
        run = compare(*pair, TOKENS)
        assert (run.equivalent, run.settings) == (not named, found.settings)


def test_a_shard_from_another_run(tmp_path: Path) -> None:
    """A right growth of another source, of which one file came along: each of its tensors is named, and no other."""
    for run, seed in (("a", 0), ("b", 1)):
        write_checkpoint(tmp_path / run, seed=seed)
        plan = make_plan(read_header(tmp_path / run), make_recipe(RECIPE))
        expand(plan, tmp_path / f"{run}-grown", weights_output(plan, 30_000))
    shards = read_header(tmp_path / "a-grown").shards
    assert len(shards) > 2
    assert check_weights(tmp_path / "a", tmp_path / "a-grown").equivalent
    shutil.copy(tmp_path / "b-grown" / shards[1], tmp_path / "a-grown" / shards[1])
    found = check_weights(tmp_path / "a", tmp_path / "a-grown")
    assert [difference.name for difference in found.differences] == list(load_file(tmp_path / "a-grown" / shards[1]))
    assert not compare(tmp_path / "a", tmp_path / "a-grown", TOKENS).equivalent


def test_tensors_that_are_missing_more_or_stored_otherwise(pair: tuple[Path, Path]) -> None:
    def change(t: Tensors) -> None:
        for layer in (0, 1):
            del t[f"model.layers.{layer}.mlp.up_proj.bias"]
        t[A + "subln.weight"] = t[A + "subln.weight"].float()

    edit(pair[1], change)
    problems = {difference.name: difference.problem for difference in check_weights(*pair).differences}
    assert problems == {
        **{f"model.layers.{layer}.mlp.up_proj.bias": "missing from the grown checkpoint" for layer in (0, 1)},
        A + "subln.weight": "stored as F32, in the source as BF16",
    }
    (pair[1] / "growth.json").unlink()
    found = check_weights(pair[1], pair[1])
    assert (found.equivalent, found.maps) == (True, "config.json")


LINEAGES: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"kv_groups": [0, -1]}, "kv_groups: expected indices, got -1"),
    "out of range": ({"noise_heads": [0, 7, 0, 1]}, "group 1 has copies of signal heads of another group"),
    "wrong length": ({"noise_heads": [0, 1]}, "noise_heads: expected 4 entries, got 2"),
    "huge": ({"hidden": [[0, 10**30]]}, "hidden: expected indices, got 1000000000000000000000000000000"),
    "long": ({"ffn": [[0, 2**31 - 1]]}, "ffn: expected runs of 144 old features in all, got 2147483647"),
    "text": ({"hidden": "all"}, "hidden: expected 3 entries, got str"),
    "number": ({"hidden": 3}, "expected the lineage of a growth, got something else"),
    "true": ({"kv_groups": [0, True]}, "kv_groups: expected indices, got True"),
    "uneven": ({"hidden": [[0, 32], [0, 16], [0, 16]]}, "hidden: expected as many copies of every old feature"),
    "backwards": ({"hidden": [[0, 32], [32, 0], [0, 64]]}, "hidden: expected runs of 64 old features in all"),
    "lost": ({"kv_groups": [1, 1]}, "an old head has no copy"),
    "another source": ({"hidden": [[0, 64]]}, "its lineage leads back to 2 groups of 3:1 on 1 KV groups, hidden 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEAGES)
def test_a_corrupted_lineage_is_refused(case: str, pair: tuple[Path, Path]) -> None:
    keys, sentence = LINEAGES[case]
    record = json.loads((pair[1] / "growth.json").read_text())
    edit_json(pair[1] / "growth.json", lineage={**record["lineage"], **keys})
    with pytest.raises(CheckpointError) as error:
        check_weights(*pair)
    assert str(error.value).startswith(f"{pair[1] / 'growth.json'}: ")
    assert sentence in str(error.value)
    assert str(error.value).endswith("restore the file, or remove it to have the maps inferred from the two configs")


def test_kv_groups_that_serve_others_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", groups=2, kv_groups=2)
    grow(tmp_path / "a", tmp_path / "b", {"hidden": 2})
    record = json.loads((tmp_path / "b" / "growth.json").read_text())
    edit_json(tmp_path / "b" / "growth.json", lineage={**record["lineage"], "kv_groups": [1, 0]})
    with pytest.raises(CheckpointError, match="a query group is not served by a copy of its own KV group"):
        check_weights(tmp_path / "a", tmp_path / "b")


def test_what_cannot_be_compared(right: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "vocab", vocab=62, layers=3)
    with pytest.raises(CompareError, match=r"have vocabulary 61 and 62, which growth never changes"):
        check_weights(right / "source", tmp_path / "vocab")
    write_checkpoint(tmp_path / "wide", hidden=48, groups=3)
    with pytest.raises(CompareError, match=r"no whole factors lead from hidden 32 to 48, noise heads 2 to 3; what the"):
        check_weights(right / "source", tmp_path / "wide")
