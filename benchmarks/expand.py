"""Expand against `dd conv=fsync` of the same number of bytes, in turn, in the same run.

    python benchmarks/expand.py [--dir DIR] [--gigabytes 1.0] [--runs 3] [--dtype bf16] [--growth='--hidden-x2 ...']

Prints a table, and one JSON object with every figure as the last line. Needs about ten times the source's size on
disk. Reads of the source come from the page cache, as after a training run's save; writes reach the disk.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint import write_checkpoint

_LAYER_ELEMENTS_PER_HIDDEN_SQUARED = 15.5  # q 1, k 0.5, v 0.5, o 1.5, three FFN matrices of 4


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall time and of both cores, and its peak anonymous memory in MiB."""

    wall: float
    cpu: float
    anonymous: float


def timed(command: list[str]) -> Run:
    """Run a command, sampling RssAnon of the process every 5 ms."""
    start, before, peak = time.perf_counter(), os.times(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, _rss_anon(process.pid))
        time.sleep(0.005)
    wall, after = time.perf_counter() - start, os.times()
    if process.returncode:
        assert process.stderr
        raise SystemExit(f"{shlex.join(command)} failed: {process.stderr.read().decode()}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, peak / 1024)


def _rss_anon(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the source")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--growth", default="--hidden-x2 --ffn-x2 --signal-x2")
    options = parser.parse_args()
    work = Path(mkdtemp(prefix="gdagrow-bench-", dir=options.dir))
    try:
        report(work, options)
    finally:
        shutil.rmtree(work)


def report(work: Path, options: argparse.Namespace) -> None:
    hidden, item = 2048 if options.gigabytes >= 0.3 else 512, {"bf16": 2, "fp32": 4}[options.dtype]
    layer = _LAYER_ELEMENTS_PER_HIDDEN_SQUARED * hidden**2 * item
    num_layers = max(1, round((options.gigabytes * 1e9 - 2 * 32000 * hidden * item) / layer))
    source_bytes = write_checkpoint(work / "source", num_layers=num_layers, hidden=hidden, dtype=options.dtype)
    base = timed([sys.executable, "-c", "import torch"])
    runs: dict[str, list[Run]] = {"dd": [], "exact": [], "noise": []}
    out_bytes = 0
    for _ in range(options.runs):
        for arm, flags in (("exact", ["--exact-copies"]), ("noise", [])):
            command = [
                sys.executable,
                "-m",
                "gdagrow_cli.main",
                "expand",
                str(work / "source"),
                str(work / "out"),
                "--quiet",
            ]
            runs[arm].append(timed(command + shlex.split(options.growth) + flags))
            out_bytes = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
            shutil.rmtree(work / "out")
        megabytes = round(out_bytes / 2**20)
        dd = ["dd", "if=/dev/zero", f"of={work / 'dd'}", "bs=1M", f"count={megabytes}", "conv=fsync"]
        runs["dd"].append(timed(dd))
        (work / "dd").unlink()
    figures = {"source_bytes": source_bytes, "output_bytes": out_bytes, "dtype": options.dtype,
               "growth": options.growth, "import_torch_rss_anon_mib": round(base.anonymous),
               "import_torch_seconds": round(base.wall, 2), "arms": {}}  # fmt: skip
    print(f"source {source_bytes / 1e9:.2f} GB {options.dtype}, output {out_bytes / 1e9:.2f} GB, {options.growth}")
    for arm, done in runs.items():
        ratios = [dd.wall / run.wall for dd, run in zip(runs["dd"], done, strict=True)]
        above = max(run.anonymous for run in done) - base.anonymous
        figures["arms"][arm] = {
            "gb_per_s": [round(out_bytes / run.wall / 1e9, 3) for run in done],
            "cpu_seconds": [round(run.cpu, 1) for run in done],
            "ratio_to_dd": [round(ratio, 2) for ratio in ratios],
            "rss_anon_above_torch_mib": None if arm == "dd" else round(above),
        }
        rate, seconds = statistics.median(figures["arms"][arm]["gb_per_s"]), statistics.median(run.cpu for run in done)
        told = f"{statistics.median(ratios):.2f} of dd ({min(ratios):.2f}-{max(ratios):.2f})"
        memory = "" if arm == "dd" else f", RssAnon {above:.0f} MiB above torch"
        print(f"{arm:6} {rate:.2f} GB/s, {told}, {seconds:.1f} CPU s{memory}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
