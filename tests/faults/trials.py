"""One command, disturbed at one call after the other: what must be there after each fault, and what must not."""

import os
import shutil
import signal
from pathlib import Path

from gdagrow.formats.journal import num_finished
from tests.checkpoints import listing
from tests.faults.cases import TARGET, Case, require_readable
from tests.faults.injector import EVERY_CALL, Ended, Fault, Forker

WHOLE, ABSENT = "whole", "absent"
REMOVALS = ("unlink", "rmdir")


class Trials:
    """Runs of one case's command in a directory of its own.

    Args:
        forker: Runs them.
        case: The command and its source.
        directory: Made here; holds the source and what the command makes.
        more: Further words of the command line.
    """

    def __init__(self, forker: Forker, case: Case, directory: Path, *more: str) -> None:
        self._forker, self._directory, self._words = forker, directory, (*case.words(directory), *more)
        self._planned = case.command == "expand"
        self.source, self.target = directory / "source", directory / TARGET
        directory.mkdir()
        case.write(self.source)
        ended = self.run(Fault())
        assert (ended.code, ended.err) == (0, ""), ended
        require_readable(self.target)
        self.calls = ended.calls
        assert not [call for call in self.calls if "/source" in call], "the source is written to"
        self._whole = listing(self.target)
        self._source = self._source_now()
        shutil.rmtree(self.target)

    def run(self, fault: Fault | None = None, **how: object) -> Ended:
        """Run the command with a fault."""
        return self._forker.run(self._directory, *self._words, fault=fault, planned=self._planned, **how)

    def pause(self, at: int, *, clear: bool = True) -> int:
        """Start the command and stop it before a call; its process number."""
        if clear:
            self.clear()
        child = self._forker.pause(self._directory, *self._words, at=at, planned=self._planned)
        assert child, f"call {at} never came"
        return child

    def wait(self) -> Ended:
        """Wait for the command that was started."""
        return self._forker.wait()

    def killed(self, kind: str, at: int) -> str:
        """`kill -9` at a call: the target is whole or absent, and the source is as it was; which of the two."""
        self.clear()
        ended = self.run(Fault(kind, at, signal.SIGKILL))
        assert ended.code == -signal.SIGKILL, (kind, at, ended)
        assert len(self.left()) <= 1, self.left()
        return self.found((kind, at))

    def failed(self, at: int, number: int) -> str:
        """A call fails with an error: one sentence of it, and nothing is left; or it could be done otherwise."""
        self.clear()
        ended, what = self.run(Fault("error", at, number)), (self.calls[at - 1], os.strerror(number))
        found = self.found(what)
        if found == WHOLE and what[0].startswith(REMOVALS):
            self.clear()  # what cannot be removed is there still
        assert self.left() == [], (what, ended, self.left())
        if ended.code == 0:
            assert (found, ended.err) == (WHOLE, ""), (what, ended)
        else:
            assert ended.code == 2, (what, ended)
            assert ended.err.count("\n") == 1, (what, ended)
            assert os.strerror(number) in ended.err, (what, ended)
            assert TARGET in ended.err, (what, ended)
            assert ("is there, whole" in ended.err) == (found == WHOLE), (what, ended)
        return found

    def stopped(self, at: int, number: int) -> str:
        """A signal that a command may clean up after comes at a call: nothing is left, or the whole target."""
        self.clear()
        ended = self.run(Fault("before", at, number))
        assert self.left() == [], (at, number, ended, self.left())
        found = self.found((at, number))
        told = {ABSENT: "nothing was written", WHOLE: "is there, whole"}[found]
        assert ended.code == 128 + number, (at, ended)
        assert told in ended.err, (at, ended)
        return found

    def shortened(self, at: int = EVERY_CALL) -> str:
        """A write is cut short, or each: the same bytes come to be."""
        self.clear()
        ended = self.run(Fault("short", at))
        assert (ended.code, ended.err) == (0, ""), (at, ended)
        found = self.found("short")
        assert found == WHOLE
        return found

    def resumed(self) -> int:
        """With `--resume`, a run that nothing disturbs makes the target; how many files it found finished and kept."""
        finished = sum(num_finished(self._directory / name) for name in self.left())
        opened = {call.rpartition("/")[2] for call in self.succeeds().calls if call.startswith("open")}
        made = [name for name in opened if name.endswith(".safetensors")]
        assert len(made) == len([name for name in self._whole if name.endswith(".safetensors")]) - finished
        return finished

    def succeeds(self) -> Ended:
        """A run that nothing disturbs makes the target, and leaves nothing of earlier ones."""
        ended = self.run(Fault())
        assert (ended.code, ended.err) == (0, ""), ended
        assert self.left() == [], self.left()
        assert self.found("undisturbed") == WHOLE
        return ended

    def clear(self) -> None:
        """Remove what killed runs left, which the next run would do first, with calls of its own."""
        for name in self.left():
            shutil.rmtree(self._directory / name)

    def left(self) -> list[str]:
        """What is in the directory beside the source and the target."""
        return sorted(set(os.listdir(self._directory)) - {"source", TARGET})

    def found(self, what: object) -> str:
        """Whether the target is there, which must be whole then and is removed; the source must be as it was."""
        assert self._source_now() == self._source, f"{what}: the source was changed"
        if not self.target.exists():
            return ABSENT
        assert listing(self.target) == self._whole, f"{what}: a target that is not whole"
        shutil.rmtree(self.target)
        return WHOLE

    def _source_now(self) -> list[object]:
        stats = [path.stat() for path in sorted(self.source.rglob("*"))]
        return [listing(self.source), [(stat.st_ino, stat.st_mtime_ns) for stat in stats]]
