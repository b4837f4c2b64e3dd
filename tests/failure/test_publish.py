import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gdagrow.errors import OutputError
from gdagrow.formats import publish
from gdagrow.formats.publish import check_free_space, staged


def refused(target: Path) -> str:
    with pytest.raises(OutputError) as caught, staged(target):
        pytest.fail("the block was entered")
    return str(caught.value)


def start(code: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


HOLD = """
    import signal, sys
    from pathlib import Path
    from gdagrow.errors import OutputError
    from gdagrow.formats.publish import staged
    # A shell starts background jobs with Ctrl-C ignored, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with staged(Path(sys.argv[1])) as partial:
            (partial / "from").write_text(sys.argv[2])
            print(partial, flush=True)
            sys.stdin.readline()
        print("published")
    except OutputError as error:
        print(error)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_the_target_appears_whole_with_everything_in_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged(target) as partial:
        assert partial.parent.parent == tmp_path
        assert partial.parent.name.startswith(".out.gdagrow-partial-")
        (partial / "a").write_text("1")
        (partial / "deep").mkdir()
        (partial / "deep" / "b").write_text("2")
        assert not target.exists()
    assert (target / "a").read_text() + (target / "deep" / "b").read_text() == "12"
    assert os.listdir(tmp_path) == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with staged(target) as partial:
        (partial / "a").write_text("1")
    assert os.listdir(target) == ["a"]


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as partial:
        (partial / "a").write_text("1")
    assert os.listdir(tmp_path / "out") == ["a"]


def test_targets_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert refused(tmp_path / "full") == (
        f"{tmp_path / 'full'} exists and is not empty; remove it or choose another output"
    )
    for name in ("file", "link"):
        assert refused(tmp_path / name) == (
            f"{tmp_path / name} exists and is not a directory; remove it or choose another output"
        )
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "link"]
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "mine"


def test_parents_that_do_not_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent in ("absent", "file"):
        assert f"{tmp_path / parent} is not a directory; create it before out is put into it" in refused(
            tmp_path / parent / "out"
        )
    assert "File name too long" in refused(tmp_path / ("n" * 250))


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(publish.Path, "mkdir", mkdir)
    assert refused(tmp_path / "out") == (
        f"{tmp_path} cannot be written (Permission denied); choose another place for out"
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_target_that_is_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="out exists and is not empty"), staged(target) as partial:  # noqa: PT012
        (partial / "a").write_text("ours")
        target.mkdir()
        (target / "x").write_text("theirs")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["x"]


def test_everything_is_on_the_disk_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_ino, (tmp_path / "out").exists()))
        real(file)

    monkeypatch.setattr(publish.os, "fsync", fsync)
    with staged(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "a").write_text("1")
    parts = [tmp_path / "out", tmp_path / "out" / "deep", tmp_path / "out" / "deep" / "a"]
    assert sorted(synced[:-1]) == sorted((part.stat().st_ino, False) for part in parts)
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_a_disk_that_cannot_sync_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(publish.os, "fsync", fsync)
    with pytest.raises(OutputError, match=r"out cannot be published \(Input/output error\)"), staged(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_no_target_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed = start(HOLD, target, Path("1"))
    assert killed.stdout
    stale = Path(killed.stdout.readline().strip()).parent
    other = tmp_path / ".out2.gdagrow-partial-abcdef"
    other.mkdir()
    killed.kill()
    killed.communicate()
    assert sorted(os.listdir(tmp_path)) == sorted([stale.name, other.name])
    with staged(target) as partial:
        assert sorted(os.listdir(tmp_path)) == sorted([other.name, partial.parent.name])
        (partial / "from").write_text("3")
    assert (target / "from").read_text() == "3"
    assert sorted(os.listdir(tmp_path)) == sorted(["out", other.name])


def test_a_target_that_another_process_writes(tmp_path: Path) -> None:
    target = tmp_path / "out"
    alive = start(HOLD, target, Path("1"))
    assert alive.stdout
    place = Path(alive.stdout.readline().strip()).parent
    assert refused(target) == (
        f"{target} is being written by another process, in {place}; wait for it or choose another output"
    )
    with staged(tmp_path / "another"):
        pass
    assert alive.communicate("\n")[0] == "published\n"
    assert (target / "from").read_text() == "1"


def test_of_two_that_begin_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has seen the other's directory yet."""
    target = tmp_path / "out"
    monkeypatch.setattr(publish, "_take_over", lambda *_: None)
    with pytest.raises(OutputError, match="out exists and is not empty"), staged(target) as first:  # noqa: PT012
        (first / "from").write_text("first")
        with staged(target) as second:
            (second / "from").write_text("second")
    assert (target / "from").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_control_c_leaves_nothing(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path / "out", Path("1"))
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err) == ("interrupted\n", "")
    assert os.listdir(tmp_path) == []


def test_killed_at_any_moment_the_target_is_whole_or_absent(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from gdagrow.formats.publish import staged
        print(flush=True)
        for i in range(1000):
            with staged(Path(sys.argv[1]) / str(i)) as partial:
                for j in range(3):
                    (partial / str(j)).write_text("whole")
    """
    for delay in range(8):
        parent = tmp_path / str(delay)
        parent.mkdir()
        process = start(code, parent)
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.02 + 0.007 * delay)
        process.kill()
        process.communicate()
        for path in parent.iterdir():
            if not path.name.startswith("."):
                assert sorted(os.listdir(path)) == ["0", "1", "2"]
                assert {file.read_text() for file in path.iterdir()} == {"whole"}


def test_a_directory_taken_for_stale_before_its_lock_is_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = Path.mkdir, []

    def mkdir(self: Path, exist_ok: bool = False) -> None:
        real(self, exist_ok=exist_ok)
        made.append(self)
        if len(made) == 1:
            self.rmdir()  # as another process that cleans up does

    monkeypatch.setattr(publish.Path, "mkdir", mkdir)
    with staged(tmp_path / "out") as partial:
        assert made[1:] == [partial.parent, partial]


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(OutputError, match=r"has too little space: 1,000,000,000,000,000 bytes needed, [\d,]+ "):
        check_free_space(tmp_path, 10**15)
