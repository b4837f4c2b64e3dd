"""Run mutated files of every kind that gdagrow reads through what reads them: only a GdagrowError may come out.

    python benchmarks/fuzz.py --inputs 200000 [--seed 0] [--target growth.json ...] [--keep DIR]

No input may take 2 seconds or 300 MiB, run or import what it names, start a process, or write outside the scratch
directory. Prints a line for each kind of file, and one JSON object as the last line; exit code 1 if anything was found.
`--keep` gets every input that did what none may, with what it did. An input depends on the seed, the kind and its
number alone.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fuzzing.running import Outcome, run_target, shares
from tests.fuzzing.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="one kind; may be given several times")
    parser.add_argument("--keep", type=Path, help="where inputs go that did what none may")
    parser.add_argument("--dir", type=Path, help="where to work (default: a directory in memory, if there is one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    work = Path(mkdtemp(prefix="gdagrow-fuzz-", dir=options.dir or (memory if memory.is_dir() else None)))
    print(
        f"{'kind':20} {'inputs':>8} {'accepted':>9} {'refused':>8} {'findings':>8} {'slowest':>9} "
        f"{'memory':>9} {'a second':>8}"
    )
    outcomes = []
    try:
        for target, count in shares(options.inputs, options.target or list(TARGETS)):
            outcomes.append(run_target(target, work / target.name.replace(" ", "-"), options.seed, count))
            print(_line(outcomes[-1]), flush=True)
    finally:
        shutil.rmtree(work)
    total = _together(outcomes)
    print(_line(total))
    if options.keep is not None:
        _keep(options.keep, total)
    for place in dict.fromkeys(finding.place for finding in total.findings):
        alike = [finding for finding in total.findings if finding.place == place]
        print(f"{len(alike)} of {alike[0].target} (number {alike[0].number}): {place}", file=sys.stderr)
    told = [asdict(outcome) | {"findings": len(outcome.findings)} for outcome in [*outcomes, total]]
    print(json.dumps({"seed": options.seed, "targets": told}))
    return bool(total.findings)


def _line(outcome: Outcome) -> str:
    return (
        f"{outcome.target:20} {outcome.inputs:8,} {outcome.accepted:9,} {outcome.refused:8,} "
        f"{len(outcome.findings):8,} {outcome.slowest * 1000:6.0f} ms {outcome.peak / 2**20:5.0f} MiB "
        f"{outcome.inputs / outcome.seconds:8,.0f}"
    )


def _together(outcomes: list[Outcome]) -> Outcome:
    total = Outcome("all")
    for outcome in outcomes:
        total.inputs += outcome.inputs
        total.accepted += outcome.accepted
        total.refused += outcome.refused
        total.seconds += outcome.seconds
        total.findings += outcome.findings
        total.slowest, total.peak = max(total.slowest, outcome.slowest), max(total.peak, outcome.peak)
    return total


def _keep(directory: Path, total: Outcome) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for finding in total.findings:
        path = directory / f"{finding.target.replace(' ', '-')}-{finding.number}"
        path.write_bytes(finding.content)
        path.with_name(f"{path.name}.txt").write_text(f"{finding.what}\n{finding.told}")


if __name__ == "__main__":
    sys.exit(main())
