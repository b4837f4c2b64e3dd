"""What is printed fits its width, and holds no control characters where nobody could see colours."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import TRAINING_STATE, write_checkpoint, write_files
from tests.command import call

COMMANDS = ("--help", "plan --help", "expand --help", "inspect {}", "plan {} --uniform-x2", "expand {} --uniform-x2",
            "diff --help", "diff {0} {0} --weights", "diff {0} {0} --length 8", "diff {0} {0} --gradients",
            "stats --help", "stats {}", "stats {} --layer 1", "report --help",
            "report {0} --seqs 1 --length 8 --out {0}.html")  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "m", groups=20, kv_groups=4, ratio=3, companions=True)
    write_files(tmp_path / "m", TRAINING_STATE)
    return tmp_path / "m"


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_fits(
    command: str, width: int, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but paths and commands to copy, which must not be broken."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = call(capsys, *command.format(model).split()).out.splitlines()
    assert lines
    wide = [line for line in lines if len(line) > width and str(model) not in line]
    assert wide == []
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", line) for line in lines)


def test_a_command_to_copy_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = call(capsys, "expand", model, "--kv-x5").out
    assert f"\n  gdagrow diff {model} {model}-kv-x5\n" in out


def on_a_terminal(*words: object, **environment: str) -> str:
    """What a command writes to a terminal of 80 columns, standard error included."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    env |= {"TERM": "xterm-256color", "COLUMNS": "80", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "gdagrow_cli.main", *map(str, words)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=env):
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 65536):
                seen += piece
        except OSError:  # Linux reports the other end's closing so
            pass
    os.close(ours)
    return seen.decode()


def test_colours_part_signal_and_noise_heads_on_a_terminal(model: Path) -> None:
    coloured, plain = on_a_terminal("inspect", model), on_a_terminal("inspect", model, NO_COLOR="1")
    assert "\x1b[1;30;46m S \x1b[0m" in coloured
    assert "\x1b[1;37;45m N \x1b[0m" in coloured
    assert not re.search(r"\x1b\[[\d;]*[34]\d[;m]", plain)
    assert " S " in plain


def test_progress_shows_on_a_terminal_unless_told_not_to(model: Path) -> None:
    assert "checking" in on_a_terminal("diff", model, model, "--weights")
    shown = on_a_terminal("expand", model, "--kv-x5")
    assert "growing" in shown
    assert "MB" in shown
    assert "\x1b" not in on_a_terminal("expand", model, "--signal-x2", "--quiet")
    assert "growing" not in on_a_terminal("expand", model, "--hidden-x2", "--json")
