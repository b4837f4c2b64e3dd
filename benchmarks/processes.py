"""Run commands as processes of their own, and measure what they take."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

GDAGROW = [sys.executable, "-m", "gdagrow_cli.main"]
PYTHON = [sys.executable, "-c", "pass"]
IMPORT_TORCH = [sys.executable, "-c", "import torch"]
_SECTOR = 512  # bytes, in which the kernel counts what a process moves to and from devices


@dataclass(frozen=True)
class Run:
    """One finished process.

    wall, cpu: Seconds that passed, and seconds of processor time on all cores.
    anonymous, resident: Peaks of RssAnon, sampled, and of the whole resident set with mapped files (VmHWM), in MiB; of
        the process and its children together, so that pages which they share count for each.
    device_read, device_written: Bytes that it moved from and to a device; not those that the page cache had or kept.
    stdout: What it printed.
    """

    wall: float
    cpu: float
    anonymous: float
    resident: float
    device_read: int
    device_written: int
    stdout: str

    def figures(self) -> dict[str, float]:
        """What was measured, rounded to what the clocks and samples give."""
        figures: dict[str, float] = {key: value for key, value in asdict(self).items() if key != "stdout"}
        return {key: round(value, 4 if key in ("wall", "cpu") else 1) for key, value in figures.items()}


def timed(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    while_it_runs: Callable[[int], None] | None = None,
) -> Run:
    """Run a command, sampling its memory every 5 ms.

    Args:
        command: The program and its arguments.
        environment: What it has beside this process's own.
        while_it_runs: Called with every sample, with the number of bytes that it has read from a device.
    """
    anonymous, resident, start = 0, 0, time.perf_counter()
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            family = [_memory(pid) for pid in (process.pid, *_children(process.pid))]
            anonymous = max(anonymous, sum(memory.get("RssAnon", 0) for memory in family))
            resident = max(resident, sum(memory.get("VmHWM", 0) for memory in family))
            if while_it_runs:
                while_it_runs(_counts(process.pid, "io").get("read_bytes", 0))
            time.sleep(0.005)
        wall, (_, status, used) = time.perf_counter() - start, ended
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout, stderr = (file.seek(0) or file.read() for file in (out, err))
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed: {stderr or stdout}")
    return Run(wall, used.ru_utime + used.ru_stime, anonymous / 1024, resident / 1024,
               used.ru_inblock * _SECTOR, used.ru_oublock * _SECTOR, stdout)  # fmt: skip


def cat(files: Sequence[Path], while_it_runs: Callable[[int], None] | None = None) -> Run:
    """Read files and drop what is read; afterwards they are in the page cache, as far as they fit."""
    command = ["sh", "-c", 'exec cat "$@" > /dev/null', "cat", *map(str, files)]
    return timed(command, while_it_runs=while_it_runs)


def dd(target: Path, num_bytes: int, *flags: str) -> Run:
    """Write so many zeros through the page cache and wait until the disk has them; the file is removed."""
    count = max(1, round(num_bytes / 2**20))
    run = timed(["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={count}", "conv=fsync", *flags])
    target.unlink()
    return run


def cp(files: Sequence[Path], directory: Path) -> Run:
    """Copy files and wait until the disk has the copies, which are removed."""
    directory.mkdir()
    script = 'to=$1; shift; cp "$@" "$to" && exec sync "$to"/*'
    run = timed(["sh", "-c", script, "cp", str(directory), *map(str, files)])
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    return run


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _memory(pid: int) -> dict[str, int]:
    """The memory figures of a process in KiB; none once it has ended."""
    return _counts(pid, "status")


def _counts(pid: int, file: str) -> dict[str, int]:
    """The lines of a process's file in /proc that hold one number, with or without kB."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    words = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {
        name: int(value[0]) for name, value in words.items() if len(value) <= 2 and value[:1] and value[0].isdigit()
    }
