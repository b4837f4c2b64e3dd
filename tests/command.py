"""The command line as a test calls it: in this process, or as a process of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from gdagrow_cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """Run a command line in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return Outcome(code, *capsys.readouterr())


def start(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start a command line as a process with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "gdagrow_cli.main", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def run(*words: object, cwd: Path | None = None, **environment: str) -> Outcome:
    """Run a command line as a process and wait for it."""
    process = start(*words, cwd=cwd, **environment)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)
