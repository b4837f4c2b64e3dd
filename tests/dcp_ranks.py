"""Distributed checkpoints written and loaded by torch itself, on processes that talk through gloo.

Run as a program, `python -m tests.dcp_ranks JOBS`, with a JSON list of `[function, ranks, *arguments]`: each job runs
its function on so many forked processes, one job after another.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by an optimizer's first step; here once for all ranks
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from gdagrow.models.gda import GdaModel, load_model
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
SEED = 7
# A step's state dict is nested as PyTorch's own tutorial on distributed checkpoints has it.
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}


def run_jobs(*jobs: tuple[object, ...]) -> None:
    """Run jobs in another process, which must end well within two minutes."""
    text = json.dumps([[str(part) if isinstance(part, Path) else part for part in job] for job in jobs])
    result = subprocess.run(
        [sys.executable, "-m", "tests.dcp_ranks", text], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr


def sharded(checkpoint: str) -> tuple[GdaModel, torch.optim.Optimizer]:
    """A checkpoint's model under FSDP2, each block by itself, after one step of AdamW."""
    model = load_model(Path(checkpoint), dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    torch.manual_seed(SEED)
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model, optimizer


def save(checkpoint: str, directory: str, reference: str) -> None:
    """Save a sharded training state; what it is unsharded goes into the safetensors file `reference`."""
    state = state_of(*sharded(checkpoint))
    whole = unsharded(state)
    dcp.save({**state, "steps": 1, "scheduler": {"last_epoch": 1}}, checkpoint_id=directory)
    if dist.get_rank() == 0:
        save_file(whole, reference)


def load(checkpoint: str, directory: str, found: str) -> None:
    """Load a training state into sharded parameters of other values; all of it goes into the file `found`."""
    model, optimizer = sharded(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    whole = unsharded(state_of(model, optimizer))
    if dist.get_rank() == 0:
        save_file(whole, found)


def go_on(checkpoint: str, directory: str, found: str, steps: int = 3) -> None:
    """Load a training state as `load` does, and write the losses of `steps` more steps to the JSON file `found`."""
    model, optimizer = sharded(checkpoint)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    torch.manual_seed(SEED)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (2, 12))
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        Path(found).write_text(json.dumps(losses))


def load_weights(checkpoint: str, directory: str, found: str) -> None:
    """As `load`, but of the weights alone."""
    model, _ = sharded(checkpoint)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=directory)
    model.load_state_dict(state["model"])
    whole = unsharded({"model": model.state_dict()})
    if dist.get_rank() == 0:
        save_file(whole, found)


def save_grids(directory: str, reference: str) -> None:
    """Save tensors that four ranks share in every way: by rows, by columns, by both, unevenly, and not at all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    torch.manual_seed(SEED)
    whole = {"both": torch.randn(6, 10), "columns": torch.randn(5, 7).bfloat16(), "rows": torch.randn(9, 4).half(),
             "uneven": torch.randn(3, 3).double(), "same": torch.randn(4), "few": torch.randn(1, 3)}  # fmt: skip
    places: Mapping[str, Any] = {
        "both": [Shard(0), Shard(1)], "columns": [Replicate(), Shard(1)], "rows": [Shard(0), Replicate()],
        "uneven": [Shard(1), Shard(0)], "same": [Replicate(), Replicate()], "few": [Shard(0), Shard(0)],
    }  # fmt: skip
    dcp.save({name: distribute_tensor(t, mesh, places[name]) for name, t in whole.items()}, checkpoint_id=directory)
    if dist.get_rank() == 0:
        save_file(whole, reference)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments}


def unsharded(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state by their keys, each of them whole on every rank."""
    found: dict[str, Tensor] = {}
    for name, tensor in state["model"].items():
        found[f"model.{name}"] = _whole(tensor)
    for name, moments in state.get("optim", {"state": {}})["state"].items():
        found |= {f"optim.state.{name}.{kind}": _whole(moment) for kind, moment in moments.items()}
    return found


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def _run(rank: int, ranks: int, port: int, function: str, arguments: list[Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo")
    try:
        globals()[function](*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, count, *rest in json.loads(sys.argv[1]):
        torch.multiprocessing.start_processes(_run, (count, free_port(), name, rest), nprocs=count, start_method="fork")
