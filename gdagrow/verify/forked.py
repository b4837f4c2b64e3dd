"""Work spread over forked processes, whose results come back in order.

Threads would hand the interpreter's lock to and fro between many short array operations: with two of them on two cores,
folding took from 0.6 (in blocks of 1 MiB) to 1.5 (of 128 KiB) of the time of one. With two processes it takes half.
"""

import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, Final, Generic, TypeVar

from gdagrow.errors import CompareError

_MAX_PROCESSES: Final = 8

Job = TypeVar("Job")
Result = TypeVar("Result")


def num_processes() -> int:
    """Processes to spread work over: one for each core that this one may run on, up to a few."""
    return min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))


def in_forks(work: Callable[[Job], Result], jobs: Sequence[Job], count: int) -> Iterator[Result]:
    """Yield `work(job)` for every job, in order, done by `count` copies of this process.

    Args:
        work: Must only compute and read files: locks that other threads hold are never released in a copy. What it
            returns or raises must be fit for pickling.
        jobs: Done in turn: by the first process the first, by the second the second.
        count: Processes.

    Raises:
        CompareError: a process was killed.
        Exception: what `work` raised first.
    """
    with ExitStack() as stack:
        forks: list[_Fork[Result]] = []
        for first in range(count):
            forks.append(_Fork.start(work, jobs[first::count]))
            stack.callback(forks[-1].stop)
        for i in range(len(jobs)):
            yield forks[i % count].receive()


@dataclass(frozen=True)
class _Raised:
    error: Exception


@dataclass(frozen=True)
class _Fork(Generic[Result]):
    process: int
    results: BinaryIO

    @staticmethod
    def start(work: Callable[[Job], Result], jobs: Sequence[Job]) -> "_Fork[Result]":
        reading, writing = os.pipe()
        parent = os.getpid()
        try:
            with warnings.catch_warnings():
                # Python warns of forking beside other threads, whose locks `work` does not need.
                warnings.simplefilter("ignore", DeprecationWarning)
                process = os.fork()
            if not process:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                os.close(reading)
                with os.fdopen(writing, "wb") as results:
                    _work_off(work, jobs, results)
        finally:
            # Whatever happens, the copy never goes on with what this process was about to do.
            if os.getpid() != parent:
                os._exit(0)
        os.close(writing)
        return _Fork(process, os.fdopen(reading, "rb"))

    def receive(self) -> Result:
        answer: Result | _Raised
        try:
            answer = pickle.load(self.results)
        except (EOFError, pickle.UnpicklingError):
            raise CompareError("a process that checked weights was killed; free some memory and start again") from None
        if isinstance(answer, _Raised):
            raise answer.error
        return answer

    def stop(self) -> None:
        self.results.close()
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


def _work_off(work: Callable[[Job], Result], jobs: Sequence[Job], results: BinaryIO) -> None:
    for job in jobs:
        answer: Result | _Raised
        try:
            answer = work(job)
        except Exception as error:
            answer = _Raised(error)
        # Once nobody listens, this raises and ends the process.
        pickle.dump(answer, results)
        results.flush()
