"""Which files of an unfinished output are finished: told by a file beside them, so that another run can go on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gdagrow.errors import OutputError, ResumeError
from gdagrow.formats.digests import FileDigest
from gdagrow.formats.small_file import read_small_file

JOURNAL_FILE: Final = "journal.jsonl"


class Journal:
    """The finished files of one output, one JSON object a line behind a first one that says what is written.

    A line is on the disk before the next file is begun; one that a kill cut short counts as never written.
    """

    def __init__(self, identity: Mapping[str, str]) -> None:
        """`identity`: What decides the bytes of the output, by what a person calls it."""
        self._identity = dict(identity)

    def continues(self, place: Path) -> bool:
        """Whether directory `place` holds finished files of this output.

        Raises:
            ResumeError: it holds finished files of another one.
        """
        lines, _ = _read(place / JOURNAL_FILE)
        if len(lines) < 2:
            return False
        if differing := [what for what, value in self._identity.items() if lines[0].get(what) != value]:
            raise ResumeError(
                f"{place} holds {len(lines) - 1} finished files of another growth, which differs in "
                f"{' and '.join(differing)}, so it cannot be gone on with; leave --resume out to begin anew, which "
                "removes it"
            )
        return True

    def open(self, place: Path) -> dict[str, FileDigest]:
        """Begin the journal in directory `place`, or go on with it; returns the files that it calls finished.

        Raises:
            OutputError: it cannot be written.
        """
        self._path = place / JOURNAL_FILE
        lines, num_bytes = _read(self._path)
        try:
            if lines:
                os.truncate(self._path, num_bytes)  # what a kill cut short must not stand before the next line
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        if not lines:
            self._append(self._identity)
        return {line["file"]: FileDigest(line["bytes"], line["sha256"]) for line in lines[1:]}

    def add(self, file: str, digest: FileDigest) -> None:
        """Say that a file, which is on the disk, is finished.

        Raises:
            OutputError: the journal cannot be written.
        """
        self._append({"file": file, "bytes": digest.num_bytes, "sha256": digest.sha256})

    def _append(self, line: Mapping[str, str | int]) -> None:
        try:
            with self._path.open("ab") as journal:
                journal.write(json.dumps(line).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path} cannot be written ({error.strerror}); free or choose another place")


def num_finished(place: Path) -> int:
    """How many files a directory holds that its journal calls finished."""
    return max(0, len(_read(place / JOURNAL_FILE)[0]) - 1)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal up to the first that is none, and their bytes; none where there is no journal."""
    lines: list[dict[str, Any]] = []
    num_bytes = 0
    try:
        for text in read_small_file(path).splitlines(keepends=True):
            line = json.loads(text)
            if not text.endswith(b"\n") or not isinstance(line, dict) or (lines and not _is_file(line)):
                break
            lines.append(line)
            num_bytes += len(text)
    except (ValueError, RecursionError):  # a CheckpointError is a ValueError
        pass
    return lines, num_bytes


def _is_file(line: Mapping[str, Any]) -> bool:
    kinds = {"file": str, "bytes": int, "sha256": str}
    return line.keys() == kinds.keys() and all(isinstance(line[key], kind) for key, kind in kinds.items())
