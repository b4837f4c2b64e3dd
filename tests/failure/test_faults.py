"""Faults below the writers, at every call that changes a file: no target that is not whole, no source that is lost."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import listing
from tests.faults.cases import DISTRIBUTED, EXPORT, SHARDS, TO_DCP, TO_SAFETENSORS, TRAINER, Case
from tests.faults.injector import WRITES, Fault, Forker
from tests.faults.trials import ABSENT, REMOVALS, WHOLE, Trials

CASES = [SHARDS, TRAINER, DISTRIBUTED, TO_DCP, TO_SAFETENSORS, EXPORT]


class Made:
    """The trials of each case, made when they are first asked for."""

    def __init__(self, forker: Forker, directory: Path) -> None:
        self._forker, self._directory, self._trials = forker, directory, dict[str, Trials]()

    def __getitem__(self, case: Case) -> Trials:
        if case.name not in self._trials:
            self._trials[case.name] = Trials(self._forker, case, self._directory / case.name.replace(" ", "-"))
        return self._trials[case.name]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with Forker() as forker:
        yield Made(forker, tmp_path_factory.mktemp("faults"))


def named(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=named)
def test_killed_before_every_call(trials: Made, case: Case) -> None:
    """What a kill behind a call leaves is what one before the next call leaves; behind the last one nothing is open."""
    tried = trials[case]
    found = {at: tried.killed("before", at) for at in range(1, len(tried.calls) + 1)}
    published = next(at for at, call in enumerate(tried.calls, 1) if call.endswith("/made"))
    assert found == {at: ABSENT if at <= published else WHOLE for at in found}
    tried.succeeds()


def test_killed_while_it_removes_what_a_killed_one_left(trials: Made) -> None:
    tried = trials[SHARDS]
    published = next(at for at, call in enumerate(tried.calls, 1) if call.endswith("/made"))
    for at in range(1, len(tried.calls), 2):
        tried.killed("before", published)
        ended = tried.run(Fault("before", at))
        assert ended.code == -signal.SIGKILL
        if not ended.calls[-1].startswith(REMOVALS):
            break
    assert at > len(listing(tried.source))
    tried.succeeds()


def test_removed_while_it_is_written(trials: Made) -> None:
    """A hasty `rm -r` of what looks like a leftover does not make a target that lacks what was removed."""
    tried = trials[SHARDS]
    for at in range(2, len(tried.calls), 5):
        child = tried.pause(at)
        tried.clear()
        os.kill(child, signal.SIGCONT)
        ended = tried.wait()
        assert tried.left() == []
        if tried.found(at) == ABSENT:
            assert (ended.code, ended.err.count("\n")) == (2, 1), (tried.calls[at - 1], ended)


def test_killed_in_the_midst_of_every_write(trials: Made) -> None:
    tried = trials[SHARDS]
    writes = [at for at, call in enumerate(tried.calls, 1) if call.split()[0] in WRITES]
    assert len(writes) > 10
    assert {tried.killed("torn", at) for at in writes} == {ABSENT}
    tried.succeeds()


@pytest.mark.parametrize("case", CASES, ids=named)
def test_an_error_at_every_call(trials: Made, case: Case) -> None:
    """At every call where there are shards; at every fifth in other cases, which share the most of the writers."""
    tried, numbers = trials[case], (errno.ENOSPC, errno.EIO, errno.EDQUOT)
    for at in range(1, len(tried.calls) + 1, 1 if case is SHARDS else 5):
        tried.failed(at, numbers[at % 3])
    tried.succeeds()


@pytest.mark.parametrize("case", CASES, ids=named)
def test_writes_that_are_cut_short(trials: Made, case: Case) -> None:
    trials[case].shortened()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop(trials: Made, number: int) -> None:
    tried = trials[SHARDS]
    found = [tried.stopped(at, number) for at in range(1 + number % 2, len(tried.calls) + 1, 5)]
    assert found[0] == ABSENT
    tried.succeeds()


def test_a_file_size_limit(trials: Made) -> None:
    tried = trials[SHARDS]
    ended = tried.run(file_bytes=3000)
    assert ended.code == 2
    assert ended.err.endswith("cannot be written (File too large); free or choose another place\n")
    assert tried.left() == []
    assert not tried.target.exists()


def test_the_contract_sees_what_breaks_it(trials: Made) -> None:
    """A target that lacks a byte, a source that is touched, and what is left behind are found."""
    tried = trials[EXPORT]
    tried.run()
    with (tried.target / "config.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(AssertionError, match="a target that is not whole"):
        tried.found("a byte more")
    shutil.rmtree(tried.target)
    (tried.source / "config.json").touch()
    with pytest.raises(AssertionError, match="the source was changed"):
        tried.found("another time")
    (tried.target.parent / "more").touch()
    assert tried.left() == ["more"]
