"""`expand --resume` behind a kill at every call: the same bytes as without, of a source that is still the same."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import SHARDS, TARGET
from tests.faults.changes import write_into
from tests.faults.injector import Fault, Forker
from tests.faults.trials import ABSENT, Trials


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as running:
        yield running


@pytest.fixture(scope="module")
def trials(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(forker, SHARDS, tmp_path_factory.mktemp("resume") / "shards", "--resume")


def finished_calls(trials: Trials) -> list[int]:
    """The calls behind which one more file is finished: the line of the journal is on the disk."""
    journal = [at for at, call in enumerate(trials.calls, 1) if call.startswith("write") and "journal" in call]
    return journal[1:]


def test_killed_before_every_other_call_and_gone_on_with(trials: Trials) -> None:
    """`benchmarks/faults.py` does it at every call."""
    finished = finished_calls(trials)
    assert len(finished) == 2
    for at in range(1, len(trials.calls) + 1, 2):
        if trials.killed("before", at) == ABSENT:
            assert trials.resumed() == sum(at > call for call in finished)


def test_a_kill_while_it_goes_on(trials: Trials) -> None:
    for at in range(1, len(trials.calls), 9):
        trials.killed("before", finished_calls(trials)[0] + 3)
        trials.run(Fault("before", at))
        if trials.found(at) == ABSENT:
            trials.resumed()


def test_a_source_that_changed_in_between_is_refused(forker: Forker, tmp_path: Path) -> None:
    """Without --resume the growth begins anew."""
    words = SHARDS.words(tmp_path)
    SHARDS.write(tmp_path / "source")
    calls = forker.run(tmp_path, *words, fault=Fault()).calls
    shutil.rmtree(tmp_path / TARGET)
    last = next(at for at, call in enumerate(calls, 1) if call.endswith("config.json"))
    assert forker.run(tmp_path, *words, "--resume", fault=Fault("before", last)).code == -signal.SIGKILL
    write_into(max((tmp_path / "source").glob("*.safetensors")))
    refused = forker.run(tmp_path, *words, "--resume")
    assert refused.code == 2
    assert (
        "2 finished files of another growth, which differs in the source, so it cannot be gone on with" in refused.err
    )
    assert not (tmp_path / TARGET).exists()
    assert forker.run(tmp_path, *words).code == 0
    assert sorted(os.listdir(tmp_path)) == [TARGET, "source"]


def test_two_that_go_on_at_once(trials: Trials) -> None:
    words = SHARDS.words(trials.target.parent)
    trials.killed("before", finished_calls(trials)[0] + 3)
    child = trials.pause(20, clear=False)
    with Forker() as other:
        second = other.run(trials.target.parent, *words, "--resume")
    assert (second.code, trials.target.exists()) == (2, False)
    assert "is being written by another process" in second.err
    os.kill(child, signal.SIGCONT)
    assert trials.wait().code == 0
    assert (trials.found("the first"), trials.left()) == ("whole", [])


def test_errors_while_it_goes_on(trials: Trials) -> None:
    for at in range(1, len(trials.calls), 9):
        trials.killed("before", finished_calls(trials)[0] + 3)
        ended = trials.run(Fault("error", at, errno.EIO))
        assert ended.code in (0, 2), ended
        assert ended.err.count("\n") == (ended.code == 2), ended
        if trials.found(at) == ABSENT:
            assert trials.resumed() >= 1
