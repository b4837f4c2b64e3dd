"""Faults below the writers: a command line in a process of its own, with one fault at the N-th call that changes files.

`inject.c` is compiled with the machine's `cc` and loaded with LD_PRELOAD. It sees the calls that Python, torch and
safetensors make into libc: opening to write, write, pwrite, writev, sendfile, copy_file_range, fsync, fdatasync,
ftruncate, fallocate, rename, unlink, rmdir, mkdir, link and close. Held against `strace` on the commands that the tests
run, it missed no call that changes a file (docs/reliability.md).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

from typing_extensions import Self

ROOT = Path(__file__).parents[2]
KINDS = {"log": 0, "before": 1, "after": 2, "torn": 3, "error": 4, "short": 5}  # as in inject.c
EVERY_CALL = 0

WRITES = ("write", "pwrite", "pwrite64", "writev", "pwritev", "pwritev64", "sendfile", "sendfile64", "copy_file_range")


@dataclass(frozen=True)
class Fault:
    """What happens at a call, counted from 1, or at every one.

    kind: `before` or `after` it a signal comes; `torn`: half of a write is done, then the signal comes; `error`: it
        fails; `short`: half of a write is done, and said so; `log`: nothing.
    value: The number of the signal, or of the error.
    """

    kind: str = "log"
    at: int = EVERY_CALL
    value: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative for a signal, what it said, and the calls that it made."""

    code: int
    out: str
    err: str
    calls: tuple[str, ...] = ()


@cache
def library() -> Path:
    """Compile the fault library; it lies in a temporary directory until this process ends."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    assert compiler, "the tests of faults need a C compiler: install one (gcc), or name it in CC"
    compiled = Path(mkdtemp(prefix="gdagrow-faults-"), "inject.so")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", compiled,
         Path(__file__).with_name("inject.c"), "-ldl"], check=True,
    )  # fmt: skip
    return compiled


class Forker:
    """Runs command lines one after the other, each in a fork of one process that has imported torch."""

    def __init__(self) -> None:
        self._scratch = Path(mkdtemp(prefix="gdagrow-faults-"))
        environment = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library()), "NO_COLOR": "1", "COLUMNS": "1000"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT, env=os.environ | environment,
        )  # fmt: skip
        assert self._read() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._scratch)

    def start(
        self, directory: Path, *words: object, fault: Fault | None = None, file_bytes: int = 0, planned: bool = False
    ) -> int:
        """Start a command line; its process number.

        Args:
            directory: Where it runs; its calls that change files in there count.
            words: What is typed after `gdagrow`.
            fault: What happens to it.
            file_bytes: The largest file that it may write.
            planned: It is an expand of a source, given by its absolute path, that never changes.
        """
        asked: dict[str, Any] = {"words": [*map(str, words)], "directory": str(directory), "fault": None,
                                 "file_bytes": file_bytes, "planned": planned}  # fmt: skip
        asked |= {name: str(self._scratch / name) for name in ("out", "err")}
        if fault is not None:
            asked["fault"] = {"under": str(directory), "at": fault.at, "kind": KINDS[fault.kind], "value": fault.value,
                              "log": str(self._scratch / "log")}  # fmt: skip
        self._say(json.dumps(asked))
        return int(self._read())

    def wait(self) -> Ended:
        """Wait for the command that was started."""
        self._say("")
        code = int(self._read())
        out, err = ((self._scratch / name).read_text() for name in ("out", "err"))
        log = self._scratch / "log"
        calls = tuple(log.read_text().splitlines()) if log.exists() else ()
        log.unlink(missing_ok=True)
        return Ended(code, out, err, calls)

    def pause(self, directory: Path, *words: object, at: int, **how: Any) -> int | None:
        """Start a command line that stops before a call; its process number, or None if it ends before."""
        child = self.start(directory, *words, fault=Fault("before", at, signal.SIGSTOP), **how)
        while (state := _state_of(child)) not in "TZ":
            time.sleep(0.001)
        return child if state == "T" else None

    def run(self, directory: Path, *words: object, **how: Any) -> Ended:
        """Run a command line to its end; see `start`."""
        self.start(directory, *words, **how)
        return self.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def _state_of(process: int) -> str:
    """One letter: T of a stopped process, Z of one that has ended."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
