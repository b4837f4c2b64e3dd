"""Which signal heads a target ratio clones more than others: ranked against plain torch, and read from a file."""

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdagrow import reading, selection
from gdagrow.archs.diffllama import DiffLlama
from gdagrow.archs.motif import Motif
from gdagrow.dcp import read_dcp
from gdagrow.errors import CheckpointError, PlanError, RecipeError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.header import Header
from gdagrow.heads import HeadCopies
from gdagrow.lambda_init import moved_norm
from gdagrow.recipe import make_recipe
from gdagrow.selection import choose, grown_heads_by_layer, head_norms
from gdagrow.views.convert import as_motif
from tests.checkpoints import write_checkpoint, write_distributed_state
from tests.diffllama import save_diffllama
from tests.growths import header as header_alone

EPS = torch.finfo(torch.float64).eps
O_PROJ, SUBLN = "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.self_attn.subln.weight"
PLAIN = {"model_type": "motif", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 8, "num_key_value_heads": 2, "num_noise_heads": 2, "head_dim": 8, "vocab_size": 61,
         "hidden_act": "poly_norm", "tie_word_embeddings": False}  # fmt: skip

# Of one group, so that head 0 is cloned by no accident.
STRONGEST_LAST = [0.1, 0.2, 0.3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", layers=3)
    return tmp_path / "source"


def rewritten(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Header:
    """The header of a checkpoint after its tensors were changed in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return read_header(source)


def norms_of(header: Header) -> Any:
    return head_norms(header, Motif(), Motif().sizes(header.config))


def chosen(header: Header, target: int, select: str) -> tuple[HeadCopies, ...] | None:
    return choose(header, Motif(), Motif().sizes(header.config), target, select)


def plainly(tensors: dict[str, torch.Tensor], layer: int, groups: int, ratio: int) -> torch.Tensor:
    """The norms of a layer, `[groups, ratio]`."""
    weight, gain = tensors[O_PROJ.format(layer)].double(), tensors[SUBLN.format(layer)].double()
    heads = weight.view(len(weight), groups, ratio, len(gain)) * gain
    return torch.linalg.vector_norm(heads, dim=(0, 3))


@pytest.mark.parametrize(
    "topology",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "hidden": 33, "groups": 3, "ratio": 2, "head_dim": 6},
        {"dtype": torch.float16, "hidden": 7, "groups": 4, "kv_groups": 2, "ratio": 4, "max_shard_bytes": 20_000},
    ],
    ids=["bf16", "fp64", "fp16 in shards"],
)
@pytest.mark.parametrize("chunk", [2**20, 700, 1])
def test_norms_are_those_of_plain_torch(
    topology: dict[str, Any], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, **topology)
    monkeypatch.setattr(selection, "_CHUNK_WEIGHTS", chunk)
    header = read_header(tmp_path)
    sizes = Motif().sizes(header.config)
    tensors = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for layer, found in enumerate(norms_of(header)):
        wanted = plainly(tensors, layer, sizes.heads.num_groups, sizes.heads.ratio)
        # Either way every weight is multiplied by its gain and squared, and all squares of a head are added.
        num_roundings = 3 + 2 * sizes.head_dim * sizes.hidden
        assert found == tuple(pytest.approx(row, rel=num_roundings * EPS, abs=0) for row in wanted.tolist())


def test_a_distributed_checkpoint_has_the_same_norms(source: Path, tmp_path: Path) -> None:
    write_distributed_state(source, tmp_path / "dcp")
    assert norms_of(read_dcp(tmp_path / "dcp", source)) == norms_of(read_header(source))


def test_a_sub_norm_without_weight_counts_as_one(tmp_path: Path) -> None:
    """And in the view in Motif's layout, whose sub-norm has one, the same for all heads of a layer."""
    save_diffllama(tmp_path, (20, 24, 2, 12, 4, 6, False), dtype=torch.float32)
    header, stored = read_header(tmp_path), load_file(tmp_path / "model.safetensors")
    found, in_view = head_norms(header, DiffLlama(), DiffLlama().sizes(header.config)), norms_of(as_motif(header))
    for layer in range(2):
        wanted = torch.linalg.vector_norm(stored[O_PROJ.format(layer)].double().view(20, 6, 12), dim=(0, 2)).tolist()
        rounding = (3 + 20 * 12) * EPS
        assert [norm for (norm,) in found[layer]] == pytest.approx(wanted, rel=rounding, abs=0)
        moved = [moved_norm(layer + 1, layer) * norm for norm in wanted]
        assert [norm for (norm,) in in_view[layer]] == pytest.approx(moved, rel=rounding + 3 * EPS, abs=0)


@pytest.mark.parametrize(
    ("target", "copies"), [(4, (1, 1, 2)), (5, (1, 2, 2)), (7, (2, 2, 3)), (8, (2, 3, 3))], ids=str
)
def test_the_largest_norms_are_cloned_once_more(source: Path, target: int, copies: tuple[int, ...]) -> None:
    """Those of each group by themselves, in each layer by itself: the last heads but for group 1 of layer 2."""

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            heads = tensors[O_PROJ.format(layer)].view(32, 2, 3, 16)
            heads.copy_(torch.ones(32, 2, 3, 16) * torch.tensor(STRONGEST_LAST)[:, None])
            tensors[SUBLN.format(layer)].fill_(1)
        tensors[O_PROJ.format(2)].view(32, 2, 3, 16)[:, 1] *= -100 * torch.tensor([9.0, 1.0, 0.5])[:, None]

    found = chosen(rewritten(source, scale), target, "norm")
    by_rank = sorted(copies, reverse=True)
    # 9 * 0.1, 1 * 0.2 and 0.5 * 0.3: the first head, then the second, then the third.
    assert found == ((copies, copies), (copies, copies), (copies, tuple(by_rank)))


def test_the_gain_of_the_sub_norm_counts(source: Path) -> None:
    """Head 0 writes through the first half of its values and head 1 through the second, which the sub-norm damps."""

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        weight, gain = tensors[O_PROJ.format(0)].zero_().view(32, 2, 3, 16), tensors[SUBLN.format(0)]
        weight[:, :, 0, :8], weight[:, :, 1, 8:] = 1.0, 1.5
        gain[:8], gain[8:] = 1.0, 0.5

    (first, *_) = norms_of(rewritten(source, halve))
    assert first == ((16.0, 12.0, 0.0),) * 2


def test_equal_heads_go_by_their_index(source: Path) -> None:
    """As those of a new block, all of which are zero, and exact copies of one head."""

    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors[O_PROJ.format(0)].zero_()
        heads = tensors[O_PROJ.format(1)].view(32, 2, 3, 16)
        heads[:, :, 1] = heads[:, :, 2] = 4 * heads[:, :, 0]

    found = chosen(rewritten(source, copy), 4, "norm")
    assert found is not None
    assert found[:2] == (((2, 1, 1),) * 2, ((1, 2, 1),) * 2)


def test_norms_are_the_same_bits_everywhere(tmp_path: Path) -> None:
    """Those of float64 additions in the order that is written down here, whatever torch's own sum makes of them."""

    def folded(values: list[float]) -> float:
        while len(values) > 1:
            half = len(values) // 2
            odd = values[-1] if len(values) % 2 else 0.0
            values = [one + other for one, other in zip(values[:half], values[half : 2 * half], strict=True)]
            values[0] += odd
        return values[0]

    write_checkpoint(tmp_path, dtype=torch.float64)
    header, tensors = read_header(tmp_path), load_file(tmp_path / "model.safetensors")
    for layer, found in enumerate(norms_of(header)):
        gain = tensors[SUBLN.format(layer)].tolist()
        columns = tensors[O_PROJ.format(layer)].T.tolist()
        squares = [folded([weight * weight for weight in column]) for column in columns]
        parts = [square * (gain[i % 16] * gain[i % 16]) for i, square in enumerate(squares)]
        wanted = [sqrt(folded(parts[16 * head : 16 * (head + 1)])) for head in range(6)]
        assert [norm for group in found for norm in group] == wanted


def test_memory_does_not_grow_with_the_model(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more weights are asked for at a time than a chunk has, or a row of `o_proj`."""
    asked = []

    class Recording(reading.TensorReader):
        def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
            asked.append((name, begin, end))
            return super().rows(name, begin, end)

    monkeypatch.setattr(reading, "TensorReader", Recording)
    monkeypatch.setattr(selection, "_CHUNK_WEIGHTS", 1000)
    norms_of(read_header(source))
    # A row of o_proj has 2 * 3 * 16 columns.
    wanted = [(at, min(at + 10, 32)) for at in range(0, 32, 10)]
    assert asked == [(O_PROJ.format(layer), *rows) for layer in range(3) for rows in wanted]


def test_weights_are_read_only_to_choose() -> None:
    """The header's files do not exist."""
    header = header_alone(PLAIN)
    with pytest.raises(CheckpointError):
        chosen(header, 4, "norm")
    assert chosen(header, 6, "norm") is None
    assert chosen(header, 4, "first") is None
    with pytest.raises(PlanError, match="the ratio would shrink from 3:1"):
        grown(header, "2:1", "norm")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_what_cannot_be_ranked_is_refused(value: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=torch.float64)
    header = rewritten(tmp_path, lambda tensors: tensors[O_PROJ.format(1)][3, 5].fill_(value))
    with pytest.raises(CheckpointError) as error:
        chosen(header, 4, "norm")
    assert str(error.value) == (
        f"{tmp_path}: {O_PROJ.format(1)} or the weight of its sub-norm has values that are not finite, or too large to "
        "be squared, so its heads cannot be ranked by norm; repair it, or choose with select first or given:FILE"
    )
    assert chosen(header, 4, "first") is None


def grown(header: Header, signal: str, select: str, noise: int = 1) -> Any:
    recipe = make_recipe({"signal": signal, "select": select, "noise": noise})
    return grown_heads_by_layer(header, Motif(), Motif().sizes(header.config), recipe)


def test_layers_that_grow_alike_share_one_growth(tmp_path: Path) -> None:
    header = header_alone(PLAIN)
    first = grown(header, "4:1", "first", noise=2)
    assert len(first) == 3
    assert first[0] is first[1] is first[2]
    assert first[0].lineage() == [[[g, 0], [g, 1], [g, 2], [g, 0]] for g in (0, 1, 0, 1)]
    (tmp_path / "heads.yaml").write_text('layers: {"*": [1, 2, 1], 1: [[1, 1, 2], [2, 1, 1]]}')
    given = grown(header, "4:1", f"given:{tmp_path / 'heads.yaml'}", noise=2)
    assert given[0] is given[2]
    assert given[0].lineage() == [[[g, 0], [g, 1], [g, 2], [g, 1]] for g in (0, 1, 0, 1)]
    assert given[1].lineage() == [[[g, 0], [g, 1], [g, 2], [g, [2, 0][g]]] for g in (0, 1, 0, 1)]


def test_a_growth_by_factors_is_that_of_every_layer() -> None:
    header = header_alone(PLAIN)
    found = grown_heads_by_layer(header, Motif(), Motif().sizes(PLAIN), make_recipe({"uniform": 2}))
    assert len(found) == 3
    assert len(set(found)) == 1
    assert found[0].after.num_kv_groups == 2


@pytest.mark.parametrize(
    ("text", "copies"),
    [
        ('layers: {"*": [2, 1, 1]}', (((2, 1, 1),) * 2,) * 3),
        ('layers: {"*": [[1, 1, 2], [1, 2, 1]]}', (((1, 1, 2), (1, 2, 1)),) * 3),
        ('layers: {0: [1, 1, 2], "*": [2, 1, 1]}', (((1, 1, 2),) * 2, ((2, 1, 1),) * 2, ((2, 1, 1),) * 2)),
        (
            "layers:\n  2: [1, 1, 2]\n  0: [2, 1, 1]\n  1:\n    - [2, 1, 1]\n    - [1, 2, 1]\n",
            (((2, 1, 1),) * 2, ((2, 1, 1), (1, 2, 1)), ((1, 1, 2),) * 2),
        ),
    ],
    ids=["every layer", "every layer, by group", "one layer apart", "all layers"],
)
def test_a_file_says_which_heads(text: str, copies: tuple[HeadCopies, ...], tmp_path: Path) -> None:
    (tmp_path / "heads.yaml").write_text(text)
    assert chosen(header_alone(PLAIN), 4, f"given:{tmp_path / 'heads.yaml'}") == copies


COUNTS = "expected 3 counts of 1 or more with the sum 4, got"
FORMAT = "docs/selection.md has the format"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", f"expected the one key layers, which leads from layers to counts of heads, got [1]; {FORMAT}"),
        (
            'heads: {}\nlayers: {"*": [2, 1, 1]}',
            "expected the one key layers, which leads from layers to counts of heads, got "
            f"{{'heads': {{}}, 'layers': {{'*': [2, 1, 1]}}}}; {FORMAT}",
        ),
        ("", f"expected the one key layers, which leads from layers to counts of heads, got None; {FORMAT}"),
        ("layers: {0: [2, 1, 1]}", f'no counts for layer 1, 2; add them, or "*" for all others; {FORMAT}'),
        (
            'layers: {"*": [2, 1, 1], 3: [2, 1, 1], "0": [2, 1, 1], true: [2, 1, 1]}',
            'layer 3: no layer of the source, expected 0 to 2, or "*" for all others; '
            "layer '0': no layer of the source, expected 0 to 2, or \"*\" for all others; "
            f'layer True: no layer of the source, expected 0 to 2, or "*" for all others; {FORMAT}',
        ),
        (
            'layers: {"*": [[2, 1, 1]], 1: [[2, 1], [2, 1, 2]], 2: 3}',
            "layer *: expected a list of counts for each of 2 groups, got 1; "
            f"layer 1, group 0: {COUNTS} [2, 1]; layer 1, group 1: {COUNTS} [2, 1, 2]; layer 2: {COUNTS} 3; {FORMAT}",
        ),
        (
            'layers: {"*": [3, 1, 0], 0: [1, true, 2], 1: [1, 1.0, 2], 2: [2, 1, 1, [1]]}',
            f"layer *: {COUNTS} [3, 1, 0]; layer 0: {COUNTS} [1, True, 2]; layer 1: {COUNTS} [1, 1.0, 2]; "
            "layer 2: expected a list of counts for each of 2 groups, got 4; "
            f"layer 2, group 0: {COUNTS} 2; layer 2, group 1: {COUNTS} 1; layer 2, group 2: {COUNTS} 1; "
            f"layer 2, group 3: {COUNTS} [1]; {FORMAT}",
        ),
        ("layers: {0: ", "not YAML: while parsing a flow node"),
        ("layers:\n  0: [2, 1, 1]\n  0: [1, 1, 2]\n", "not YAML: while constructing a mapping"),
    ],
)
def test_all_that_is_wrong_in_a_file_is_said_at_once(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.yaml"
    file.write_text(text)
    with pytest.raises((PlanError, RecipeError)) as error:
        chosen(header_alone(PLAIN), 4, f"given:{file}")
    assert str(error.value).startswith(f"selection {file}: {complaint}")
    assert "not YAML" in complaint or str(error.value) == f"selection {file}: {complaint}"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        chosen(header_alone(PLAIN), 4, f"given:{tmp_path / 'no.yaml'}")
    assert str(error.value) == f"selection {tmp_path / 'no.yaml'}: cannot be read: No such file or directory"
