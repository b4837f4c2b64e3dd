"""Expand against `dd conv=fsync` of the same number of bytes, in turn, in the same run.

    python benchmarks/expand.py [--dir DIR] [--gigabytes 1.0] [--runs 3] [--dtype bf16] [--growth='--hidden-x2 ...']

Prints a table, and one JSON object with every figure as the last line. Needs about ten times the source's size on
disk. Reads of the source come from the page cache, as after a training run's save; writes reach the disk.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, Run, timed


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
    source_bytes = write_source(work / "source", gigabytes=options.gigabytes, dtype=options.dtype)
    base = timed(IMPORT_TORCH)
    runs: dict[str, list[Run]] = {"dd": [], "exact": [], "noise": []}
    out_bytes = 0
    for _ in range(options.runs):
        for arm, flags in (("exact", ["--exact-copies"]), ("noise", [])):
            command = [*GDAGROW, "expand", str(work / "source"), str(work / "out"), "--quiet"]
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
