"""Expand a training state (weights and two fp32 moments) against expanding the weights alone.

The baseline is a model of as many bytes as the whole state, so that both write about as much.
"""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from cases import Case, Figures, Settings, compare
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, cat, timed

from gdagrow.archs import architecture_of
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.torch_file import lay_out_torch_file
from gdagrow.rows import claim

_GROWTH = "--hidden-x2 --ffn-x2 --signal-x2 --exact-copies"
# Bytes of a bf16 weight with two moments, over those of the weight.
_STATE = 5


def benchmark(settings: Settings) -> Iterator[Case]:
    """The state beside weights of as many bytes."""
    gigabytes = 0.03 if settings.quick else 0.3
    sources = {"state": settings.work / "state", "weights": settings.work / "weights"}
    write_source(sources["state"], gigabytes=gigabytes, dtype="bf16")
    write_moments(sources["state"])
    write_source(sources["weights"], gigabytes=gigabytes * _STATE, dtype="bf16")
    out, output_bytes = settings.work / "out", {}

    def expand(arm: str) -> Figures:
        run = timed([*GDAGROW, "expand", str(sources[arm]), str(out), "--quiet", *shlex.split(_GROWTH)])
        output_bytes[arm] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        shutil.rmtree(out)
        return {**run.figures(), "bytes": output_bytes[arm]}

    cat([file for source in sources.values() for file in source.iterdir()])  # into the page cache
    facts = {"growth": _GROWTH, "torch_anonymous": round(timed(IMPORT_TORCH).anonymous, 1)}
    arms = {arm: lambda arm=arm: expand(arm) for arm in sources}
    yield compare("bf16 with fp32 moments", facts, arms, settings.num_rounds(3))
    for source in sources.values():
        shutil.rmtree(source)


def write_moments(directory: Path) -> None:
    """Write an `optimizer.pt` of AdamW, with float32 moments, beside the weights of a checkpoint."""
    header = read_header(directory)
    architecture = architecture_of(header.config)
    names = list(claim(header, architecture, architecture.sizes(header.config)))
    state = {
        number: {
            "step": torch.tensor(1000.0),
            **{key: TargetTensor(f"{name}/{key}", "F32", header.tensors[name].shape)
               for key in ("exp_avg", "exp_avg_sq")},
        }
        for number, name in enumerate(names)
    }  # fmt: skip
    tree = {"state": state, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": list(state)}]}
    layout = lay_out_torch_file("optimizer.pt", tree)
    # The same values over and over: what is in them does not change the work.
    octets = tensor_bytes(torch.randn(2**21, generator=torch.Generator().manual_seed(0)).square())
    with FileWriter(directory / layout.file, layout) as writer:
        left = layout.data_bytes
        while left:
            writer.write(octets[: min(left, len(octets))])
            left -= min(left, len(octets))
        writer.close()
