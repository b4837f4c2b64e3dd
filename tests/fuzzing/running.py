"""Mutated inputs through their readers, in a process that is watched: what comes out, and what it takes."""

import contextlib
import hashlib
import mmap
import os
import pickle
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Final, NoReturn

from gdagrow.errors import GdagrowError
from tests.fuzzing.targets import TARGETS, Target

SECONDS: Final = 2.0  # of the processor, for one input
STUCK_SECONDS: Final = 20.0  # for one that no signal stops
MORE_BYTES: Final = 300 * 2**20  # of memory for one input
_SPACE_BYTES: Final = 4 * 2**30  # of addresses beside what the process begins with

# What no reader does, by the audit event that Python raises for it. A name that is imported may come from an input,
# and code is compiled and run by imports alone.
_NEVER: Final = frozenset((
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.__new__", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class", "compile", "exec", "import",
    "ctypes.dlopen", "code.__new__", "marshal.loads",
    "urllib.Request", "os.fork", "os.forkpty", "pty.spawn", "webbrowser.open",
))  # fmt: skip
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TooSlowError(BaseException):
    """An input took too long; no reader catches it."""


@dataclass(frozen=True)
class Finding:
    """An input that did what none may do: `what` in a word, and the traceback or what else is known."""

    target: str
    number: int
    what: str
    told: str
    content: bytes

    @property
    def place(self) -> str:
        """Where it happened, by which alike ones are known."""
        lines = [line for line in self.told.splitlines() if "gdagrow/" in line and "tests/" not in line]
        last = self.told.strip().splitlines()[-1] if self.told.strip() else ""
        return f"{self.what}: {lines[-1].strip() if lines else ''} {last[:160]}"


@dataclass
class Outcome:
    """What a target's inputs came to. peak: bytes of memory above those that the first inputs took, at most."""

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    peak: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def random_of(seed: int, target: str, number: int) -> Random:
    """What an input is made of depends on these alone."""
    return Random(hashlib.sha256(f"{seed}/{target}/{number}".encode()).digest())


def run_target(target: Target, directory: Path, seed: int, count: int) -> Outcome:
    """Run inputs `0` to `count` of a target in processes of their own: one that dies costs one input."""
    outcome, begun = Outcome(target.name, count), time.monotonic()
    ranges = [(0, count)]
    while ranges:
        first, stop = ranges.pop()
        place = directory / f"{first}-{stop}"
        found, number = _run_range(target, place, seed, first, stop)
        outcome.accepted += found.accepted
        outcome.refused += found.refused
        outcome.slowest, outcome.peak = max(outcome.slowest, found.slowest), max(outcome.peak, found.peak)
        outcome.findings += found.findings
        ranges += [(number + 1, stop)] * (number + 1 < stop)
        # What came before an input that ended its process was lost with it.
        ranges += [(first, number)] * (found.inputs == 0 and number > first)
        shutil.rmtree(place)
    outcome.seconds = time.monotonic() - begun
    return outcome


def _run_range(target: Target, directory: Path, seed: int, first: int, stop: int) -> tuple[Outcome, int]:
    """What inputs came to, and the last that was run; an outcome without inputs if that ended the process."""
    reached = mmap.mmap(-1, 8)  # the input that is at work, seen from outside
    reached[:8] = struct.pack("<q", first)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            with os.fdopen(writing, "wb") as report:
                pickle.dump(_Child(target, directory, seed, reached).run(first, stop), report)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    raw, died = _watched(child, reading, reached)
    (number,) = struct.unpack("<q", reached[:8])
    if raw:
        found: Outcome = pickle.loads(raw)  # what our own process wrote
        return found, number
    content = _input(target, directory, seed, number)
    return Outcome(target.name, findings=[Finding(target.name, number, died, died, content)]), number


def _input(target: Target, directory: Path, seed: int, number: int) -> bytes:
    """An input made again; its corpus is as it was written."""
    corpus = pickle.loads((directory / "corpus").read_bytes())
    return target.mutate(random_of(seed, target.name, number), corpus)


def _watched(child: int, reading: int, reached: mmap.mmap) -> tuple[bytes, str]:
    """What a process reports, and how it ended if it reports nothing."""
    raw, at, since, stuck = b"", reached[:8], time.monotonic(), False
    while True:
        ready, _, _ = select.select([reading], [], [], 1.0)
        if ready:
            part = os.read(reading, 2**20)
            if not part:
                break
            raw += part
        if reached[:8] != at:
            at, since = reached[:8], time.monotonic()
        if time.monotonic() - since > STUCK_SECONDS + 40 * (at == bytes(8)):
            os.kill(child, signal.SIGKILL)
            stuck = True
            break
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if stuck:
        return b"", "hangs"
    return (raw, "") if status == 0 else (b"", f"dies ({status})")


class _Child:
    """The process that runs inputs."""

    def __init__(self, target: Target, directory: Path, seed: int, reached: mmap.mmap) -> None:
        self._target, self._directory, self._seed, self._reached = target, directory, seed, reached
        self._is_watching = False
        self._seen: list[str] = []

    def run(self, first: int, count: int) -> Outcome:
        """Run inputs until `count`, or until one took so much memory that this process cannot tell any more."""
        outcome = Outcome(self._target.name, count - first)
        self._directory.mkdir(parents=True)
        path, corpus, read = self._target.make(self._directory)
        (self._directory / "corpus").write_bytes(pickle.dumps(corpus))
        for number in (0, 1, *range(2, 12)):
            path.write_bytes(corpus[number % len(corpus)])
            with contextlib.suppress(GdagrowError):  # a growth that this checkpoint does not allow
                read(number)
        os.chdir(self._directory)
        tempfile.tempdir = str(self._directory)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        # The peak begins anew: that of the process this is a fork of may lie far above what it has now.
        Path("/proc/self/clear_refs").write_text("5")
        signal.signal(signal.SIGPROF, _too_slow)
        sys.addaudithook(self._audit)
        for number in range(first, count):
            self._reached[:8] = struct.pack("<q", number)
            content = self._target.mutate(random_of(self._seed, self._target.name, number), corpus)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            path.write_bytes(content)
            before, begun = _peak(), time.process_time()
            finding = self._read(read, number, content, outcome)
            took, more = time.process_time() - begun, _peak() - before
            outcome.slowest, outcome.peak = max(outcome.slowest, took), max(outcome.peak, more)
            if finding is None and more > MORE_BYTES:
                finding = Finding(self._target.name, number, "memory", f"{more / 2**20:.0f} MiB", content)
            if finding is not None:
                outcome.findings.append(finding)
            if more > MORE_BYTES:
                break
        return outcome

    def _read(self, read: Any, number: int, content: bytes, outcome: Outcome) -> Finding | None:
        """Read one input; what comes of it is counted, or told."""

        def found(what: str, told: str) -> Finding:
            return Finding(self._target.name, number, what, told, content)

        self._seen.clear()
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            self._is_watching = True
            try:
                read(number)
                outcome.accepted += 1
            finally:
                self._is_watching = False
                signal.setitimer(signal.ITIMER_PROF, 0)
        except GdagrowError as error:
            outcome.refused += 1
            if len(str(error)) > 100_000:
                return found("endless sentence", f"{len(str(error))} characters: {str(error)[:200]}")
        except TooSlowError:
            return found("slow", traceback.format_exc())
        except BaseException:
            return found("raises", traceback.format_exc())
        return found("does what none may", "\n".join(self._seen)) if self._seen else None

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_watching:
            return
        if event in _NEVER:
            if not _is_our_own(event):
                self._seen.append(f"{event} {str(args)[:200]}\n" + "".join(traceback.format_stack(limit=8)))
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES and isinstance(args[0], str | bytes):
            place = os.path.realpath(os.fsdecode(args[0]))
            if not place.startswith((str(self._directory), "/dev/null")):
                self._seen.append(f"{event} {args}")


def _is_our_own(event: str) -> bool:
    """Whether an import, which is all that compiles code, was asked for by code that stands in a file."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return event == "import"


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _too_slow(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise TooSlowError


def shares(total: int, names: list[str]) -> Iterator[tuple[Target, int]]:
    """How many inputs each target gets."""
    whole = sum(TARGETS[name].share for name in names)
    for name in names:
        yield TARGETS[name], max(1, round(total * TARGETS[name].share / whole))
