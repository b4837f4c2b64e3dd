"""The command as a process: what it imports, signals, pipes, its own bugs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gdagrow
from tests.checkpoints import write_checkpoint
from tests.command import call, run, start

COMMANDS = ("inspect", "plan", "expand", "diff", "stats")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == call(capsys, "--version")
    assert call(capsys, "--version").out == f"gdagrow {gdagrow.__version__}\n"


@pytest.mark.parametrize("words", [("--help",), (), *((command, "--help") for command in COMMANDS)])
def test_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: gdagrow" in outcome.out
    if words[:1] in (("plan",), ("expand",)):
        assert "--signal-x2" in outcome.out
        assert "head-dim" not in outcome.out


@pytest.mark.parametrize(
    "words", [["--help"], ["expand", "--help"], ["inspect", "{}"], ["plan", "{}", "--uniform-x2"],
              ["expand", "{}", "--uniform-x2", "--dry-run", "--json"], ["expand", "{}", "--signal-x0"]],
)  # fmt: skip
def test_torch_is_not_imported_before_it_is_needed(words: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", companions=True)
    words = [word.format(tmp_path / "model") for word in words]
    slow = "{'torch', 'numpy', 'safetensors'}"
    code = f"import sys; from gdagrow_cli.main import main; main({words!r}); assert not {slow} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["expand", "--help"], ["train", "--help"]])
def test_a_command_line_is_parsed_with_next_to_nothing(words: list[str]) -> None:
    code = f"import sys; from gdagrow_cli.main import main; main({words!r}); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = result.stderr.split()
    assert {name for name in modules if name.split(".")[0] == "gdagrow"} == {
        "gdagrow", "gdagrow.errors", "gdagrow.choices"
    }  # fmt: skip
    # pydantic comes with typer, for the options of a command.
    assert {"torch", "numpy", "ruamel", "safetensors"}.isdisjoint(modules)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, code: int, word: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", hidden=512, ffn=2048, head_dim=64, layers=2)
    process = start("expand", tmp_path / "model", "--uniform-x6")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".model-uniform-x6.gdagrow-partial-*/output/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", f"{word}; nothing was written\n")
    assert os.listdir(tmp_path) == ["model"]


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", groups=8)
    process = start("inspect", tmp_path / "model")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_our_own_bug_is_no_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model")
    monkeypatch.setattr("gdagrow_cli.inspect_view.checkpoint_figures", lambda _: 1 // 0)
    outcome = call(capsys, "inspect", tmp_path / "model")
    assert outcome.code == 70
    assert outcome.err.startswith("error: a bug in gdagrow, ZeroDivisionError")
    assert outcome.err.count("\n") == 1
    assert "--debug" in outcome.err
    assert "Traceback" in call(capsys, "inspect", tmp_path / "model", "--debug").err


def test_paths_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets print as they are; what a terminal would act on is escaped; bytes that are no text do not crash."""
    for name, printed in (("[red]x", "[red]x"), ("a\x1b[31mb", "a\\x1b[31mb"), ("caf\udce9", "caf\\udce9")):
        write_checkpoint(tmp_path / name)
        outcome = run("expand", tmp_path / name, "--signal-x2")
        assert (outcome.code, outcome.err) == (0, "")
        assert f"wrote {tmp_path}/{printed}-signal-x2" in outcome.out
        again = call(capsys, "expand", tmp_path / name, "--signal-x2")
        assert f"{printed}-signal-x2 exists and is not empty" in again.err
        assert json.loads(call(capsys, "inspect", tmp_path / name, "--json").out)["directory"] == str(tmp_path / name)


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "naïve")
    outcome = run("plan", tmp_path / "naïve", "--signal-x2", PYTHONIOENCODING="ascii")
    assert (outcome.code, outcome.err) == (0, "")
