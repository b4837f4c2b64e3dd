"""What is frozen stays bit for bit as it is, under decay and momentum, while everything else moves; then it moves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gdagrow.archs.diffllama import DiffLlama
from gdagrow.errors import CheckpointError, GdagrowError
from gdagrow.models.gda import GdaModel, load_model
from gdagrow.train.freeze import WHOLE, Frozen, Part, blocks, freeze, old_heads
from gdagrow.train.rates import scaled_rates
from tests.checkpoints import write_checkpoint
from tests.diffllama import TOPOLOGIES, save_diffllama
from tests.growths import grow

DIM = 4
SMALL = {"groups": 2, "kv_groups": 1, "ratio": 2, "head_dim": DIM, "hidden": 12, "ffn": 16, "vocab": 23, "bias": True,
         "dtype": torch.float32}  # fmt: skip
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda of: AdamW(of, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda of: AdamW(of, lr=0.01, weight_decay=0.1, fused=True),
    "adam with decay": lambda of: Adam(of, lr=0.01, weight_decay=0.1),
    "sgd": lambda of: SGD(of, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model: GdaModel, optimizer: Optimizer, seed: int) -> None:
    ids = torch.randint(model.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = model(ids, ids).loss
    assert loss is not None
    loss.backward()
    optimizer.step()


def first_heads(directory: Path) -> dict[str, list[int]]:
    """The indices of the first copy of each head, by projection, by `growth.json` and the layout of Motif, by hand."""
    lineage = json.loads((directory / "growth.json").read_text())["lineage"]
    ratio = len(lineage["signal_heads"][0])
    queries, outputs, seen = [], [], []
    for group, (heads, noise) in enumerate(zip(lineage["signal_heads"], lineage["noise_heads"], strict=True)):
        for slot, head in enumerate([*heads, noise]):
            if head not in seen:
                seen.append(head)
                queries.append(group * (ratio + 1) + slot)
                if slot < ratio:
                    outputs.append(group * ratio + slot)
    kv = [c for c, old in enumerate(lineage["kv_groups"]) if old not in lineage["kv_groups"][:c]]
    rows = {"q_proj": (queries, DIM), "k_proj": (kv, 2 * DIM), "v_proj": (kv, 2 * DIM), "o_proj": (outputs, 2 * DIM)}
    return {name: [head * size + i for head in heads for i in range(size)] for name, (heads, size) in rows.items()}


GROWTHS = {
    "signal": {"signal": 2}, "target ratio": {"signal": "3:1"}, "noise": {"signal": 2, "noise": 2},
    "all": {"signal": 2, "noise": 2, "kv": 2, "hidden": 2, "ffn": 3},
}  # fmt: skip


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_old_heads_stay_and_all_else_moves(tmp_path: Path, growth: str, name: str) -> None:
    write_checkpoint(tmp_path / "source", **SMALL)
    grow(tmp_path / "source", tmp_path / "grown", GROWTHS[growth])
    model = load_model(tmp_path / "grown")
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, 0)  # so that there is momentum
    frozen = old_heads(config_of(tmp_path / "grown"), tmp_path / "grown", [n for n, _ in model.named_parameters()])
    freezer = freeze(optimizer, model, frozen, num_steps=3)
    before = snapshot(model)
    for seed in range(3):
        step(model, optimizer, 1 + seed)
    after, old = snapshot(model), first_heads(tmp_path / "grown")
    assert freezer.steps_left == 0
    for parameter, value in after.items():
        projection = parameter.split(".")[-2]
        moved = value != before[parameter]
        expected = torch.ones_like(moved)
        if projection in old and not (projection == "o_proj" and parameter.endswith("bias")):
            indices = torch.tensor(old[projection])
            expected[(slice(None), indices) if projection == "o_proj" else indices] = False
        if name == "sgd":  # a gradient or a weight of zero moves by nothing
            assert not moved[~expected].any(), parameter
            assert moved.any() == expected.any(), parameter
        else:
            assert torch.equal(moved, expected), parameter
    step(model, optimizer, 9)
    for parameter, value in snapshot(model).items():
        assert (value != after[parameter]).any(), parameter


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_stay_and_all_else_moves(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "source", **{**SMALL, "layers": 3})
    model = load_model(tmp_path / "source")
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, 0)
    freezer = freeze(optimizer, model, blocks([n for n, _ in model.named_parameters()], [0, 2]), num_steps=2)
    before = snapshot(model)
    for seed in range(2):
        step(model, optimizer, 1 + seed)
    after = snapshot(model)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == {n for n in after if not n.startswith(("model.layers.0.", "model.layers.2."))}
    assert freezer.steps_left == 0
    step(model, optimizer, 9)
    assert all(not torch.equal(value, after[n]) for n, value in snapshot(model).items())


def test_removed_early_and_beside_scaled_rates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", **SMALL)
    model = load_model(tmp_path / "source")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    frozen: Frozen = {name: (Part(0, 0, 2), Part(0, 5, 6)), **blocks([name.replace(".0.", ".1.")], [1])}
    scaled_rates(optimizer, {model.get_parameter(name): 0.5})
    freezer = freeze(optimizer, model, frozen, num_steps=100)
    before = snapshot(model)
    step(model, optimizer, 0)
    moved = (snapshot(model)[name] != before[name]).all(1)
    assert moved.tolist() == [False, False, True, True, True, False] + [True] * 10
    freezer.remove()
    assert freezer.steps_left == 99
    step(model, optimizer, 1)
    assert (snapshot(model)[name] != before[name]).all()


class Interrupted(SGD):
    """Raises when it has moved everything."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.defaults["raises"]:
            raise RuntimeError("interrupted")


def test_a_step_that_raises_is_made_good_at_the_next() -> None:
    model = nn.Linear(3, 4)
    optimizer = Interrupted(model.parameters(), lr=0.1)
    freeze(optimizer, model, {"weight": (Part(0, 1, 3),)}, num_steps=2)
    before = snapshot(model)["weight"]
    for raises in (True, False):
        optimizer.defaults["raises"] = raises
        model(torch.ones(3)).sum().backward()
        if raises:
            with pytest.raises(RuntimeError, match="interrupted"):
                optimizer.step()
        else:
            optimizer.step()
    assert (snapshot(model)["weight"] != before).all(1).tolist() == [True, False, False, True]


def test_only_the_last_growth_makes_heads_new(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", **SMALL)
    grow(tmp_path / "source", tmp_path / "once", {"signal": 2})
    grow(tmp_path / "once", tmp_path / "twice", {"signal": "5:1"})
    name = "model.layers.1.self_attn.q_proj.weight"
    # 2:1 became 4:1, which became 5:1 by a second copy of head 0, last before the noise head.
    kept = (Part(0, 0, 4 * DIM), Part(0, 5 * DIM, 10 * DIM), Part(0, 11 * DIM, 12 * DIM))
    config = config_of(tmp_path / "twice")
    assert old_heads(config, tmp_path / "twice", [f"_orig_mod.{name}"]) == {f"_orig_mod.{name}": kept}
    assert old_heads(config, tmp_path / "twice", ["model.layers.0.self_attn.k_proj.weight", "lm_head.weight"]) == {
        "model.layers.0.self_attn.k_proj.weight": WHOLE
    }


def test_no_heads_of_a_new_block_are_old(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", **SMALL)
    grow(tmp_path / "source", tmp_path / "grown", {"signal": 2, "insert": "after:0"})
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    kept = (Part(0, 0, 2 * DIM), Part(0, 4 * DIM, 7 * DIM), Part(0, 9 * DIM, 10 * DIM))
    assert old_heads(config_of(tmp_path / "grown"), tmp_path / "grown", names) == {names[0]: kept, names[2]: kept}


def test_old_heads_of_diffllama_lie_in_halves(tmp_path: Path) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[1], dtype=torch.float32)
    config = config_of(tmp_path / "source")
    grow(tmp_path / "source", tmp_path / "grown", {"signal": 2, "noise": 2})
    dim, pairs = DiffLlama().sizes(config).head_dim, config["num_attention_heads"] // 2
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = {
        row
        for part in old_heads(config_of(tmp_path / "grown"), tmp_path / "grown", [name])[name]
        for row in range(part.start, part.stop)
    }
    assert len(rows) == 2 * pairs * dim
    # As many in either half: the signal heads come first, then the noise heads of the same numbers.
    half = 2 * pairs * dim
    assert {row - half for row in rows if row >= half} == {row for row in rows if row < half}


def test_sharded_parameters_are_frozen_where_they_are(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Module()
        # Rows 4 to 7 of 8, and all rows' columns in one.
        for name in ("rows", "columns"):
            local = torch.ones(4, 6)
            setattr(model, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)))
        optimizer = SGD(model.parameters(), lr=0.1)
        freeze(optimizer, model, {"rows": (Part(0, 0, 2), Part(0, 3, 6)), "columns": (Part(1, 1, 3),)}, num_steps=5)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        rows, columns = ((p.detach().to_local() == 1).tolist() for p in model.parameters())  # type: ignore[attr-defined]
        assert rows == [[True] * 6] * 2 + [[False] * 6] * 2
        assert columns == [[False, True, True, False, False, False]] * 4
    finally:
        dist.destroy_process_group()


def test_refusals(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", **SMALL)
    grow(tmp_path / "source", tmp_path / "grown", {"hidden": 2})
    model = load_model(tmp_path / "grown")
    optimizer, config = SGD(model.parameters(), lr=0.1), config_of(tmp_path / "grown")
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(CheckpointError, match=r"no growth\.json, which says what is old; freeze layers"):
        old_heads(config, tmp_path / "source", names)
    with pytest.raises(GdagrowError, match="the last growth cloned no heads, so all of them are old; freeze layers"):
        old_heads(config, tmp_path / "grown", names)
    with pytest.raises(GdagrowError, match="the model has no layer 2, 7, only 2 layers counted from 0"):
        blocks(names, [0, 7, 2])
    with pytest.raises(GdagrowError, match="to freeze: nothing; expected names"):
        freeze(optimizer, model, {}, num_steps=1)
    with pytest.raises(GdagrowError, match="to freeze: a, b; expected names of the model's parameters"):
        freeze(optimizer, model, {"a": WHOLE, "b": WHOLE}, num_steps=1)
    with pytest.raises(GdagrowError, match="steps to freeze: expected 1 or more, got 0"):
        freeze(optimizer, model, blocks(names, [0]), num_steps=0)
    record = json.loads((tmp_path / "grown" / "growth.json").read_text())
    for lineage in ({}, {**record["lineage"], "signal_heads": [3]}, {**record["lineage"], "kv_groups": []}):
        (tmp_path / "grown" / "growth.json").write_text(json.dumps({**record, "lineage": lineage}))
        with pytest.raises(CheckpointError, match="it is not the lineage of a model with 2 groups"):
            old_heads(config, tmp_path / "grown", names)
