"""Expand a training state (weights and two fp32 moments) against expanding the weights alone, in turn, in the same run.

    python benchmarks/state.py [--dir DIR] [--gigabytes 0.5] [--runs 3] [--dtype bf16] [--growth='--hidden-x2 ...']

The baseline is a model of as many bytes as the whole state, so that both write about as much. Prints a table, and one
JSON object with every figure as the last line. Needs about twenty times `--gigabytes` on disk, in bf16.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, Run, timed

from gdagrow.archs import architecture_of
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.torch_file import lay_out_torch_file
from gdagrow.header import ITEM_BYTES
from gdagrow.rows import claim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the weights that have moments")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--growth", default="--hidden-x2 --ffn-x2 --signal-x2 --exact-copies")
    options = parser.parse_args()
    work = Path(mkdtemp(prefix="gdagrow-bench-", dir=options.dir))
    try:
        report(work, options)
    finally:
        shutil.rmtree(work)


def report(work: Path, options: argparse.Namespace) -> None:
    item_bytes = ITEM_BYTES[options.dtype.upper().replace("FP32", "F32")]
    write_source(work / "state", gigabytes=options.gigabytes, dtype=options.dtype)
    write_moments(work / "state")
    write_source(work / "weights", gigabytes=options.gigabytes * (item_bytes + 8) / item_bytes, dtype=options.dtype)
    base = timed(IMPORT_TORCH)
    runs: dict[str, list[Run]] = {"weights": [], "state": []}
    out_bytes = dict.fromkeys(runs, 0)
    for _ in range(options.runs):
        for arm, done in runs.items():
            command = [*GDAGROW, "expand", str(work / arm), str(work / "out"), "--quiet"]
            done.append(timed(command + shlex.split(options.growth)))
            out_bytes[arm] = sum(file.stat().st_size for file in (work / "out").iterdir())
            shutil.rmtree(work / "out")
    rates = {arm: [out_bytes[arm] / run.wall / 1e9 for run in done] for arm, done in runs.items()}
    ratios = [state / weights for state, weights in zip(rates["state"], rates["weights"], strict=True)]
    figures = {"growth": options.growth, "dtype": options.dtype, "output_bytes": out_bytes, "arms": {},
               "state_rate_over_weights_rate": [round(ratio, 2) for ratio in ratios]}  # fmt: skip
    for arm, done in runs.items():
        above = max(run.anonymous for run in done) - base.anonymous
        rate, cpu = statistics.median(rates[arm]), statistics.median(run.cpu for run in done)
        per_gigabyte = cpu / out_bytes[arm] * 1e9
        figures["arms"][arm] = {
            "gb_per_s": [round(rate, 3) for rate in rates[arm]], "cpu_seconds_per_gb": round(per_gigabyte, 2),
            "rss_anon_above_torch_mib": round(above),
        }  # fmt: skip
        print(f"{arm:8} {out_bytes[arm] / 1e9:.2f} GB out, {rate:.2f} GB/s, {per_gigabyte:.2f} CPU s a GB, "
              f"RssAnon {above:.0f} MiB above torch")  # fmt: skip
    print(f"the state's rate is {statistics.median(ratios):.2f} of the weights' ({min(ratios):.2f}-{max(ratios):.2f})")
    print(json.dumps(figures))


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


if __name__ == "__main__":
    main()
