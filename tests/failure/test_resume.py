"""`--resume`: an interrupted expand goes on at its first unfinished file, and gives the same bytes."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow import expand as expanding
from gdagrow.errors import CheckpointError, OutputError, ResumeError
from gdagrow.expand import Expansion, expand
from gdagrow.formats import digests
from gdagrow.formats.journal import JOURNAL_FILE, Journal
from gdagrow.formats.publish import unfinished
from gdagrow.growing import prepare_growth
from gdagrow.recipe import make_recipe
from tests.checkpoints import listing, write_checkpoint, write_distributed_state, write_training_state
from tests.command import call
from tests.growths import RANDOM

NOISY = {"hidden": 2, "signal": 2, "seed": 3}


class Interrupted(BaseException):
    """Not an Exception, as Ctrl-C is none."""


def grow(
    source: Path, target: Path, *, stop_after: float = 1, resume: bool = True, recipe: dict[str, Any] | None = None
) -> Expansion:
    """Grow in files of 20 kB; stop once a share of the bytes is written."""
    growing = prepare_growth(source, make_recipe(recipe or NOISY), max_shard_bytes=20_000)
    left = [stop_after * growing.output.num_bytes]

    def advance(num_bytes: int) -> None:
        left[0] -= num_bytes
        if left[0] < 0:
            raise Interrupted

    return expand(growing.plan, target, growing.output, resume=resume, progress=advance)


def stop(source: Path, target: Path, *, after: float = 0.6, resume: bool = True) -> Path:
    """Stop a growth before its end; returns what it left."""
    with pytest.raises(Interrupted):
        grow(source, target, stop_after=after, resume=resume)
    place = unfinished(target)
    assert place is not None
    assert not target.exists()
    return place


def weights(directory: Path) -> None:
    write_checkpoint(directory, companions=True, max_shard_bytes=30_000)


def distributed_state(directory: Path) -> None:
    write_checkpoint(directory.with_name("model"))
    write_distributed_state(directory.with_name("model"), directory)
    shutil.copy(directory.with_name("model") / "config.json", directory)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    weights(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("write", [weights, write_training_state, distributed_state])
@pytest.mark.parametrize("after", [0.3, 0.95])
def test_the_same_bytes_as_without_interruption(tmp_path: Path, write: Callable[[Path], None], after: float) -> None:
    write(tmp_path / "source")
    assert grow(tmp_path / "source", tmp_path / "whole").resumed == ()
    stop(tmp_path / "source", tmp_path / "grown", after=after)
    resumed = grow(tmp_path / "source", tmp_path / "grown")
    assert 0 < len(resumed.resumed) < len(resumed.shards)
    assert listing(tmp_path / "grown") == listing(tmp_path / "whole")
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []


def test_finished_files_are_not_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = stop(source, tmp_path / "grown")
    told = [json.loads(line) for line in (place / JOURNAL_FILE).read_text().splitlines()[1:]]
    real, made = expanding.FileWriter, []

    def writer(path: Path, layout: Any) -> Any:
        made.append(layout.file)
        return real(path, layout)

    monkeypatch.setattr(expanding, "FileWriter", writer)
    resumed = grow(source, tmp_path / "grown")
    assert resumed.resumed == tuple(line["file"] for line in told)
    assert len(told) >= 3
    assert sorted([*made, *resumed.resumed]) == sorted(resumed.shards)


def test_stopped_again_and_again(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "whole")
    finished = [len((stop(source, tmp_path / "grown", after=share / 10) / JOURNAL_FILE).read_text().splitlines()) - 1
                for share in range(2, 10)]  # fmt: skip
    assert finished == sorted(finished)
    assert finished[0] < finished[-1]
    grow(source, tmp_path / "grown")
    assert listing(tmp_path / "grown") == listing(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_finished_file_that_was_damaged_is_made_again(source: Path, tmp_path: Path, harm: str) -> None:
    grow(source, tmp_path / "whole")
    place = stop(source, tmp_path / "grown")
    file = json.loads((place / JOURNAL_FILE).read_text().splitlines()[2])["file"]
    path = place / "output" / file
    if harm == "flip":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        os.truncate(path, 100)
    else:
        path.unlink()
    assert file not in grow(source, tmp_path / "grown").resumed
    assert listing(tmp_path / "grown") == listing(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_of_the_journal_that_was_cut_short_never_stood(source: Path, tmp_path: Path, cut: int) -> None:
    grow(source, tmp_path / "whole")
    journal = stop(source, tmp_path / "grown") / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines)[:-cut])
    left = stop(source, tmp_path / "grown", after=0.95) / JOURNAL_FILE
    assert left.read_bytes().startswith(b"".join(lines[:-1]))
    assert len(grow(source, tmp_path / "grown").resumed) >= len(lines) - 2
    assert listing(tmp_path / "grown") == listing(tmp_path / "whole")


@settings(RANDOM, max_examples=200)
@given(st.data())
def test_a_journal_of_any_bytes(data: st.DataObject) -> None:
    """It continues nothing, or is of another growth; what it says is never more than it was told."""
    first = json.dumps({"the recipe": "1"}).encode() + b"\n"
    line = json.dumps({"file": "a", "bytes": 1, "sha256": "0"}).encode() + b"\n"
    deep = b"[" * 100_000 + b"\n"
    parts = st.one_of(st.binary(max_size=40), st.sampled_from([first, line, deep, b"{}\n", b'{"bytes": NaN}\n', b"\n"]))
    content = b"".join(data.draw(st.lists(parts, max_size=5)))
    with TemporaryDirectory() as directory:
        place, journal = Path(directory), Journal({"the recipe": "1"})
        (place / JOURNAL_FILE).write_bytes(content)
        with suppress(ResumeError):
            assert journal.continues(place) == content.startswith(first + line)
        assert set(journal.open(place)) <= {"a"}


def test_a_pipe_in_the_place_of_a_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / JOURNAL_FILE)
    assert not Journal({"the recipe": "1"}).continues(tmp_path)


def test_another_growth_is_refused_and_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    place = stop(source, tmp_path / "grown")
    before = listing(place)
    with pytest.raises(ResumeError, match=r"finished files of another growth, which differs in the recipe and the"):
        grow(source, tmp_path / "grown", recipe={**NOISY, "seed": 4})
    os.utime(source / "model-00001-of-00002.safetensors" if False else next(source.glob("*.safetensors")))
    with pytest.raises(
        ResumeError, match=r"which differs in the source, so it cannot be gone on with; leave --resume "
    ):
        grow(source, tmp_path / "grown")
    assert listing(place) == before
    grow(source, tmp_path / "grown", resume=False)
    assert not place.exists()


def test_a_source_that_was_moved_meanwhile(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "whole")
    stop(source, tmp_path / "grown")
    shutil.copytree(source, tmp_path / "elsewhere" / "source")
    assert grow(tmp_path / "elsewhere" / "source", tmp_path / "grown").resumed
    assert listing(tmp_path / "grown") == listing(tmp_path / "whole")


def test_without_resume_nothing_is_left_or_taken_over(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        grow(source, tmp_path / "grown", stop_after=0.6, resume=False)
    assert unfinished(tmp_path / "grown") is None
    place = stop(source, tmp_path / "grown")
    assert grow(source, tmp_path / "grown", resume=False).resumed == ()
    assert not place.exists()


def test_nothing_finished_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        grow(source, tmp_path / "grown", stop_after=0)
    assert unfinished(tmp_path / "grown") is None


def test_the_source_changes_after_its_last_row_was_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes in growth.json are of the bytes that were grown."""
    shard = next(source.glob("*.safetensors"))

    class Late(digests.SourceFiles):
        def digests(self) -> dict[str, digests.FileDigest]:
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
            return super().digests()

    monkeypatch.setattr(expanding, "SourceFiles", Late)
    with pytest.raises(CheckpointError, match=r"changed while it was being read: it has another size or time"):
        grow(source, tmp_path / "grown", resume=False)
    assert unfinished(tmp_path / "grown") is None


def test_what_a_person_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "expand", source, tmp_path / "grown", "--hidden-x2", "--max-shard-size", "20kB"
    real, room = expanding.FileWriter, [3]

    def writer(path: Path, layout: Any) -> Any:
        if not room[0]:
            raise OutputError(f"{path} cannot be written (No space left on device); free or choose another place")
        room[0] -= 1
        return real(path, layout)

    with monkeypatch.context() as patch:
        patch.setattr(expanding, "FileWriter", writer)
        failed = call(capsys, *words, "--resume")
    assert failed.code == 2
    num_files = int(failed.err.rpartition(" of ")[2].split()[0])
    assert failed.err.endswith(
        f"free or choose another place; 3 of {num_files} files are finished and stay for expand --resume\n"
    )
    resumed = call(capsys, *words, "--resume")
    assert resumed.code == 0, resumed.err
    assert f"in {num_files} files (3 finished before)" in resumed.out
