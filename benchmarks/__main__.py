"""Run the benchmarks, each against its baselines in turn in the same run, and print their tables.

    python benchmarks [NAME ...] [--quick] [--rounds N] [--only TEXT] [--dir DIR] [--out FILE]

Without names, all but full-size (a quarter of an hour and 31 GB by itself). `--out` keeps every round's figures as
JSON; what it has of other benchmarks stays.
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from cases import BUSY, Case, Settings
from tables import table_of


class Place(NamedTuple):
    """Where a benchmark stands, and what it compares."""

    module: str
    function: str
    about: str


BENCHMARKS: Mapping[str, Place] = {
    "start-up": Place("start_up", "benchmark", "the command's start against `python -c pass`"),
    "model": Place("model", "speed", "GDA's forward and backward against standard attention, at 1024 tokens"),
    "model-memory": Place("model", "memory", "what they take at their peak"),
    "model-profile": Place("model", "profile", "where the time of one attention layer goes"),
    "expand": Place("expand", "against_the_disk", "`expand` against `dd conv=fsync` and `cp` of as many bytes"),
    "sizes": Place("expand", "by_size", "its seconds and memory from 0.1 to 10 GB"),
    "passes": Place("expand", "passes", "what it reads from the disk where a source does not fit into memory"),
    "state": Place("state", "benchmark", "expanding weights with moments against weights alone"),
    "diff-weights": Place("diff", "weights", "`diff --weights` against `cat` from the page cache"),
    "diff-logits": Place("diff", "logits", "`diff --logits` against two plain forwards"),
    "full-size": Place("full_size", "benchmark", "Motif-2.6B grown to Motif-2-12.7B, and proved"),
}
_NAMED_ONLY = ("full-size",)
_PACKAGES = ("gdagrow", "torch", "transformers", "safetensors", "numpy", "typer", "rich", "pydantic")
_THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")
_ROOT = Path(__file__).parents[1]


def main() -> None:
    options = parsed()
    work = Path(mkdtemp(prefix="gdagrow-bench-", dir=options.dir))
    settings = Settings(work, options.quick, options.rounds, options.only)
    results: dict[str, Any] = {"benchmarks": {}}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())
    try:
        for name in options.names or [name for name in BENCHMARKS if name not in _NAMED_ONLY]:
            results["benchmarks"][name] = run(name, settings)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"\n{table_of(name, results)}\n", flush=True)
    finally:
        shutil.rmtree(work)


def parsed() -> argparse.Namespace:
    about = "\n".join(f"  {name:13} {place.about}" for name, place in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python benchmarks", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\n{about}",
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run")
    parser.add_argument("--quick", action="store_true", help="small models and one round: does it all work?")
    parser.add_argument("--rounds", type=int, help="how often each arm runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases that have this in their name")
    parser.add_argument("--dir", type=Path, help="where to work, on the disk to measure (default: a temporary one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to keep the figures")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    return options


def run(name: str, settings: Settings) -> dict[str, Any]:
    """One benchmark's cases, with the machine and the versions that they were measured on."""
    place, start, cases = BENCHMARKS[name], time.perf_counter(), []
    print(f"{name}: {place.about}", flush=True)
    for case in getattr(importlib.import_module(place.module), place.function)(settings):
        cases.append(case)
        print(
            f"  {case.name}: {len(case.rounds)} rounds, {time.perf_counter() - start:.0f} s{_warning(case)}", flush=True
        )
    if not cases:
        raise SystemExit(f"no case of {name} has {settings.only!r} in its name")
    flags = ["--quick"] if settings.quick else []
    flags += ["--rounds", str(settings.rounds)] if settings.rounds else []
    flags += ["--only", settings.only] if settings.only else []
    return {
        "command": shlex.join(["python", "benchmarks", name, *flags]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "seconds": round(time.perf_counter() - start),
        "machine": machine(settings.work),
        "versions": {"Python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        "environment": {key: os.environ[key] for key in _THREADS if key in os.environ},
        "cases": [asdict(case) for case in cases],
    }


def _warning(case: Case) -> str:
    return f"; other programs took {case.busy_before:.0%} of the machine" if case.busy_before > BUSY else ""


def machine(work: Path) -> dict[str, Any]:
    """What figures depend on beside the versions."""
    described = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in described if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = subprocess.run(["df", "--output=fstype", work], capture_output=True, text=True, check=True).stdout.split()[
        -1
    ]
    return {"CPU": next(iter(models), platform.machine()), "cores": os.cpu_count(),
            "memory": f"{memory / 2**30:.0f} GiB", "Linux": platform.release().partition("-")[0], "disk": disk}  # fmt: skip


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
