"""Processes of one thread each that run jobs; none outlives the process that started them by more than a step."""

import fcntl
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from traceback import format_exc
from typing import IO, Any, Final

from gdagrow.errors import GdagrowError, OutputError, TrainError
from gdagrow.experiment.jobs import Job, run_job

_LOCK: Final = ".lock"
_WORKERS_LOCK: Final = ".workers.lock"
_OMP: Final = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Finished:
    """A job that is done, or why it is not; with a `trace` if that is a bug of ours."""

    job: Job
    error: str | None
    trace: str | None = None


class Workers:
    """Processes that take jobs, while `with` lasts.

    Args:
        count: How many.
        experiment: Its directory, which `alone_in` has locked.
    """

    def __init__(self, count: int, experiment: Path) -> None:
        self._count, self._experiment = count, experiment
        self._idle: list[tuple[Any, Connection]] = []
        self._busy: dict[Connection, tuple[Any, Job]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in [*self._idle, *((process, c) for c, (process, _) in self._busy.items())]:
            process.kill()  # a run's states are whole at any moment
            process.join()
            connection.close()

    @property
    def is_free(self) -> bool:
        """Whether a job would begin at once."""
        return len(self._busy) < self._count

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return bool(self._busy)

    def begin(self, job: Job) -> None:
        """Give a job to a process that is free."""
        process, connection = self._idle.pop() if self._idle else self._started()
        connection.send(job)
        self._busy[connection] = process, job

    def wait(self, tick: Callable[[Job, int], None]) -> Finished:
        """Wait for the next job that is done, and tell of steps meanwhile.

        Raises:
            TrainError: a process was killed.
        """
        while True:
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                process, job = self._busy[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    process.join()
                    raise TrainError(
                        f"{job.told}: its process was killed (exit code {process.exitcode}); the same command goes on"
                    ) from None
                if isinstance(message, int):
                    tick(job, message)
                    continue
                del self._busy[connection]
                self._idle.append((process, connection))
                return Finished(job, *message)

    def _started(self) -> tuple[Any, Connection]:
        context = get_context("spawn")  # a fork of a process with torch's threads may hang
        ours, theirs = context.Pipe()
        before = {key: os.environ.get(key) for key in _OMP}
        os.environ.update(_OMP)  # read when the new process imports torch
        # Ctrl-C goes to all processes of a terminal. The new one never sees it, from its first moment on: this one
        # ends it.
        resource_tracker.ensure_running()  # which takes a mask away when it begins
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = context.Process(target=_work, args=(theirs, os.getpid(), self._experiment), daemon=True)
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        theirs.close()
        return process, ours


def _work(connection: Connection, parent: int, experiment: Path) -> None:
    """Run jobs until there is no one left to ask for them."""
    import torch

    import gdagrow.train.run  # noqa: F401  (what follows is about what it imports)

    torch.set_num_threads(1)
    # Every run collects garbage a few times, each time through all that was imported: 70% of the time of a run of a
    # few steps. What stays for ever need not be looked at.
    gc.collect()
    gc.freeze()
    with (experiment / _WORKERS_LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        # A process that starts when its parent is killed must not begin a run that another one may have begun since.
        while os.getppid() == parent:
            try:
                job = connection.recv()
            except EOFError:
                return
            connection.send(_outcome(job, lambda step: _tick(connection, parent, step)))


def _tick(connection: Connection, parent: int, step: int) -> None:
    if os.getppid() != parent:  # it was killed, and another may want this run
        os._exit(1)
    connection.send(step)


def _outcome(job: Job, tick: Callable[[int], None]) -> tuple[str | None, str | None]:
    try:
        run_job(job, tick)
    except GdagrowError as error:
        return str(error), None
    except OSError as error:
        return f"{error.filename or job.directory}: {error.strerror}; the same command goes on", None
    except Exception as error:
        return f"{type(error).__name__}: {error}", format_exc()
    return None, None


@contextmanager
def alone_in(experiment: Path) -> Iterator[None]:
    """Hold an experiment's directory, once no process of an earlier one works in it any more.

    Raises:
        TrainError: another one has it.
        OutputError: nothing can be written there.
    """
    with _opened(experiment / _LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainError(f"{experiment}: another process runs this experiment; wait for it or stop it") from None
        with _opened(experiment / _WORKERS_LOCK) as workers:
            fcntl.flock(workers, fcntl.LOCK_EX)
        yield


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("w")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose another --out") from None
