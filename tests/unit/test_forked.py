"""Work in forked processes: in order, with what is raised, and without a process left behind."""

import os
import signal
from pathlib import Path

import pytest

from gdagrow.errors import CheckpointError, CompareError
from gdagrow.verify.forked import in_forks


def children() -> str:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


def test_results_come_in_order_from_other_processes() -> None:
    before = children()
    found = list(in_forks(lambda job: (job * job, os.getpid()), range(101), 3))
    assert [square for square, _ in found] == [job * job for job in range(101)]
    assert len({process for _, process in found} - {os.getpid()}) == 3
    assert children() == before


def test_fewer_jobs_than_processes() -> None:
    assert list(in_forks(str, [7], 3)) == ["7"]
    assert list(in_forks(str, [], 3)) == []


def test_what_is_raised_there_is_raised_here_in_its_turn() -> None:
    def work(job: int) -> int:
        if job == 5:
            raise CheckpointError("the sixth")
        return job

    before, done = children(), []
    with pytest.raises(CheckpointError, match="the sixth"):
        done.extend(in_forks(work, range(100), 2))
    results = in_forks(work, range(100), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    results.close()  # type: ignore[attr-defined]
    assert children() == before


def test_a_process_that_is_killed_is_told() -> None:
    def work(job: int) -> int:
        if job == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    results, before = in_forks(work, range(10), 2), children()
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CompareError, match="a process that checked weights was killed; free some memory"):
        next(results)
    assert children() == before


def test_no_process_outlives_the_one_that_waits() -> None:
    """Whoever is killed leaves no copies that go on working: their next result has nobody to go to."""
    reading, writing = os.pipe()
    waiting = os.fork()
    if not waiting:
        try:
            os.close(reading)
            for _ in in_forks(lambda job: job, range(10**9), 2):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(waiting, 0)
    assert os.read(reading, 1) == b""  # once the last copy, which holds the other end too, is gone
    os.close(reading)
