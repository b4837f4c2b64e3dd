"""Training after growth: exact copies stay identical bit for bit, zero-sum noise parts every pair of copies."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gdagrow.expand import expand
from gdagrow.formats.safetensors_header import read_header
from gdagrow.models.gda import GdaModel, load_model
from gdagrow.output import weights_output
from gdagrow.plan import GrowthPlan, make_plan
from gdagrow.recipe import make_recipe
from tests.checkpoints import write_checkpoint

STEPS = 20


def grown_and_trained(directory: Path, dtype: torch.dtype, **recipe: object) -> tuple[GrowthPlan, GdaModel]:
    """Grow a random checkpoint, train it on random tokens with AdamW, weights in `dtype`."""
    write_checkpoint(directory / "source", dtype=dtype, scale=0.1)
    plan = make_plan(read_header(directory / "source"), make_recipe(recipe))
    expand(plan, directory / "grown", weights_output(plan, 10**9))
    model = load_model(directory / "grown")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(61, (4, 16), generator=generator)
        optimizer.zero_grad()
        loss = model(tokens, tokens).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
    return plan, model


def copies(plan: GrowthPlan, model: GdaModel, name: str, dim: int) -> list[list[Tensor]]:
    """For each old index that has several copies along a dimension of a tensor: their slices after training."""
    (tensor,) = (t for t in plan.tensors if t.name == name)
    weight = model.get_parameter(name).detach().movedim(dim, 0)
    slices: dict[int, list[Tensor]] = {}
    for new, old in enumerate(tensor.growth.dims[dim]):
        slices.setdefault(old, []).append(weight[new])
    return [group for group in slices.values() if len(group) > 1]


PLACES = {
    "model.layers.1.self_attn.q_proj.weight": (0, 1), "model.layers.1.self_attn.k_proj.weight": (0, 1),
    "model.layers.0.self_attn.v_proj.weight": (0, 1), "model.layers.0.self_attn.o_proj.weight": (0, 1),
    "model.layers.0.mlp.gate_proj.weight": (0, 1), "model.layers.1.mlp.up_proj.weight": (0, 1),
    "model.layers.1.mlp.down_proj.weight": (0, 1), "lm_head.weight": (1,),
}  # fmt: skip


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_parts_all_copies_of_everything(tmp_path: Path, dtype: torch.dtype, factor: int) -> None:
    plan, model = grown_and_trained(tmp_path, dtype, uniform=factor)
    for name, dims in PLACES.items():
        for dim in dims:
            groups = copies(plan, model, name, dim)
            assert groups
            same = sum(torch.equal(a, b) for group in groups for a, b in combinations(group, 2))
            assert same == 0, f"{same} pairs of copies of {name} along dim {dim} are still the same"


def test_exact_copies_never_part(tmp_path: Path) -> None:
    plan, model = grown_and_trained(tmp_path, torch.float32, uniform=2, exact_copies=True)
    for name, dims in PLACES.items():
        for dim in dims:
            for group in copies(plan, model, name, dim):
                assert torch.equal(group[0], group[1]), (name, dim)


def test_cloned_signal_heads_part_though_only_o_proj_got_noise(tmp_path: Path) -> None:
    plan, model = grown_and_trained(tmp_path, torch.bfloat16, signal=2)
    noisy = {tensor.parameter for tensor in plan.tensors if tensor.noisy}
    assert noisy == {"model.layers.{layer}.self_attn.o_proj.weight"}
    for layer in range(2):
        for group in copies(plan, model, f"model.layers.{layer}.self_attn.q_proj.weight", 0):
            assert not torch.equal(group[0], group[1])


def test_copies_in_new_blocks_part_though_what_reads_them_is_zero(tmp_path: Path) -> None:
    """Noise in proportion to zero is none: there the rows that make the copies have it."""
    plan, model = grown_and_trained(tmp_path, torch.float32, signal=2, noise=2, kv=2, ffn=2, depth=1, insert="top")
    for name, dim in (("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.v_proj", 0),
                      ("self_attn.o_proj", 1), ("mlp.gate_proj", 0), ("mlp.down_proj", 1)):  # fmt: skip
        for layer in (1, 2):
            for group in copies(plan, model, f"model.layers.{layer}.{name}.weight", dim):
                assert not any(torch.equal(one, two) for one, two in combinations(group, 2)), (name, layer)


def test_exact_copies_are_exact_in_new_blocks_too(tmp_path: Path) -> None:
    plan, model = grown_and_trained(tmp_path, torch.float32, signal=2, ffn=2, depth=1, insert="top", exact_copies=True)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        for group in copies(plan, model, f"model.layers.2.{name}.weight", 0):
            assert torch.equal(group[0], group[1])
