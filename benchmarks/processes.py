"""Run commands as processes of their own, and measure what they take."""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

GDAGROW = [sys.executable, "-m", "gdagrow_cli.main"]
IMPORT_TORCH = [sys.executable, "-c", "import torch"]


@dataclass(frozen=True)
class Run:
    """One finished process.

    wall, cpu: Seconds that passed, and seconds of processor time on all cores.
    anonymous, resident: Peaks of RssAnon, sampled, and of the whole resident set with mapped files (VmHWM), in MiB; of
        the process and its children together, so that pages which they share count for each.
    stdout: What it printed.
    """

    wall: float
    cpu: float
    anonymous: float
    resident: float
    stdout: str


def timed(command: list[str]) -> Run:
    """Run a command, sampling its memory every 5 ms."""
    start, before, anonymous, resident = time.perf_counter(), os.times(), 0, 0
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        while process.poll() is None:
            family = [_memory(pid) for pid in (process.pid, *_children(process.pid))]
            anonymous = max(anonymous, sum(memory.get("RssAnon", 0) for memory in family))
            resident = max(resident, sum(memory.get("VmHWM", 0) for memory in family))
            time.sleep(0.005)
        wall, after = time.perf_counter() - start, os.times()
        stdout, stderr = (file.seek(0) or file.read() for file in (out, err))
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed: {stderr or stdout}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, anonymous / 1024, resident / 1024, stdout)


def cat(files: list[Path]) -> Run:
    """Read files and drop what is read."""
    return timed(["sh", "-c", 'exec cat "$@" > /dev/null', "cat", *map(str, files)])


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _memory(pid: int) -> dict[str, int]:
    """The memory figures of a process in KiB; none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)
            if value.endswith("kB")}  # fmt: skip
