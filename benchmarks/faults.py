"""Faults below the writers at every call that changes a file, for every command that writes: what is lost is counted.

    python benchmarks/faults.py [--dir DIR] [--only WORD] [--every 1]

For each writer: `kill -9` before a call, behind it, and in the midst of every write; ENOSPC, EIO and EDQUOT at a call;
a write cut short; SIGINT or SIGTERM. After each: the target is whole, byte for byte, or not there; the source is as it
was; an error is one sentence and leaves nothing; what a kill left is removed, or gone on with, by the next run. Then
the source is changed in each of five ways. Needs a C compiler, some 10 minutes of one idle core and 100 MB of disk;
prints a table, and one JSON object as the last line.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.checkpoints import listing
from tests.faults.cases import (
    DISTRIBUTED,
    EXPORT,
    EXPORT_WITH_CODE,
    ONE_FILE,
    SHARDS,
    SHARDS_FLOAT32,
    TARGET,
    TO_DCP,
    TO_SAFETENSORS,
    TRAINER,
    Case,
)
from tests.faults.changes import CHANGES
from tests.faults.injector import ROOT, WRITES, Fault, Forker, library
from tests.faults.trials import ABSENT, WHOLE, Trials

CASES = [
    SHARDS, SHARDS_FLOAT32, ONE_FILE, TRAINER, DISTRIBUTED, TO_DCP, TO_SAFETENSORS, EXPORT, EXPORT_WITH_CODE,
]  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
Figures = Counter[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--only", default="", help="writers with this in their name alone")
    parser.add_argument("--every", type=int, default=1, help="a sample: at every so many calls alone")
    options = parser.parse_args()
    work, began = Path(mkdtemp(prefix="gdagrow-faults-", dir=options.dir)), time.perf_counter()
    trials: dict[str, Callable[[Path, int], Figures]] = {case.name: partial(disturb, case) for case in CASES}
    trials |= {
        "expand --resume": partial(gone_on_with, SHARDS), "expand, source changed": partial(changed, SHARDS),
        "train: state, growth, model, restart": trained,
    }  # fmt: skip
    table: dict[str, Figures] = {}
    try:
        print(f"{'writer':38}{'calls':>7}{'faults':>8}{'whole':>7}{'absent':>8}{'losses':>8}{'seconds':>9}")
        for name, trial in trials.items():
            if options.only in name:
                start = time.perf_counter()
                table[name] = trial(work / name.replace(" ", "-"), options.every)
                told = "".join(f"{table[name][key]:{width}}" for key, width in
                               (("calls", 7), ("faults", 8), ("whole", 7), ("absent", 8), ("losses", 8)))  # fmt: skip
                print(f"{name:38}{told}{time.perf_counter() - start:9.0f}", flush=True)
    finally:
        shutil.rmtree(work)
    total = sum(table.values(), Figures())
    total.setdefault("losses", 0)
    print(json.dumps({"writers": len(table), **total, "seconds": round(time.perf_counter() - began), "of": table}))
    sys.exit(total["losses"] > 0)


def counted(figures: Figures, what: object, trial: object) -> None:
    """Count a trial by what it found; one whose contract is broken is a loss."""
    figures["faults"] += 1
    try:
        figures[str(trial())] += 1  # type: ignore[operator]
    except AssertionError as loss:
        figures["losses"] += 1
        print(f"  lost: {what}: {str(loss)[:500]}", file=sys.stderr)


def disturb(case: Case, directory: Path, every: int) -> Figures:
    """Every fault at every call of a command."""
    with Forker() as forker:
        trials = Trials(forker, case, directory)
        figures = Figures(calls=len(trials.calls))
        for at, call in list(enumerate(trials.calls, 1))[::every]:
            for kind in ("before", "after", *(["torn"] if call.split()[0] in WRITES else [])):
                counted(figures, (case.name, call, kind), lambda at=at, kind=kind: behind_a_kill(trials, kind, at))
            for number in ERRORS:
                counted(figures, (case.name, call, number), lambda at=at, number=number: trials.failed(at, number))
            number = (signal.SIGINT, signal.SIGTERM)[at % 2]
            counted(figures, (case.name, call, number), lambda at=at, number=number: trials.stopped(at, number))
            if call.split()[0] in WRITES:
                counted(figures, (case.name, call, "short"), lambda at=at: trials.shortened(at))
    return figures


def behind_a_kill(trials: Trials, kind: str, at: int) -> str:
    """A kill, and the next run: which cleans up behind it."""
    found = trials.killed(kind, at)
    if found == ABSENT:
        trials.succeeds()
    return found


def gone_on_with(case: Case, directory: Path, every: int) -> Figures:
    """A kill at every call, twice, and `--resume` behind both."""
    with Forker() as forker:
        trials = Trials(forker, case, directory, "--resume")
        figures = Figures(calls=len(trials.calls))
        for at, call in list(enumerate(trials.calls, 1))[::every]:
            for kind in ("before", *(["torn"] if call.split()[0] in WRITES else [])):
                counted(figures, (case.name, call, kind), lambda at=at, kind=kind: killed_twice(trials, kind, at))
    return figures


def killed_twice(trials: Trials, kind: str, at: int) -> str:
    found = trials.killed(kind, at)
    if found == ABSENT:
        trials.run(Fault("before", at))
        if trials.found(at) == ABSENT:
            trials.resumed()
    return found


def changed(case: Case, directory: Path, every: int) -> Figures:
    """The source changes at every call: refused, or what was made is of the old bytes."""
    directory.mkdir()
    case.write(directory / "kept")
    shutil.copytree(directory / "kept", directory / "source")
    words, target, figures = case.words(directory), directory / TARGET, Figures()
    with Forker() as forker:
        calls = forker.run(directory, *words, fault=Fault()).calls
        whole = listing(target)
        figures["calls"] = len(calls)
        shutil.rmtree(target)

        def trial(at: int, change: object) -> str:
            child = forker.pause(directory, *words, at=at)
            assert child, at
            change(max((directory / "source").glob("*.safetensors")))  # type: ignore[operator]
            os.kill(child, signal.SIGCONT)
            ended = forker.wait()
            try:
                assert (ended.code, target.exists()) in ((0, True), (2, False)), ended
                if ended.code:
                    return ABSENT
                assert listing(target) == whole, "grown of bytes that were not hashed"
                return WHOLE
            finally:
                for name in set(os.listdir(directory)) - {"kept"}:
                    shutil.rmtree(directory / name)
                shutil.copytree(directory / "kept", directory / "source")

        for at, call in list(enumerate(calls, 1))[::every]:
            for change in CHANGES:
                counted(figures, ("source", call, change), lambda at=at, change=change: trial(at, change))
    return figures


def trained(directory: Path, every: int) -> Figures:
    """What a training run saves, grows, publishes and removes; see tests/faults/saving.py."""
    directory.mkdir()
    ended = subprocess.run(
        [sys.executable, "-m", "tests.faults.saving", directory, "--every", str(2 * every)], capture_output=True,
        text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library())}, check=False,
    )  # fmt: skip
    if ended.returncode:
        print(ended.stderr[-2000:], file=sys.stderr)
        return Figures(losses=1)
    found = json.loads(ended.stdout.splitlines()[-1])
    figures = sum(map(Figures, found["where"].values()), Figures())
    return Figures(figures, absent=figures["faults"] - figures["whole"], resumed=found["resumed"])


if __name__ == "__main__":
    main()
