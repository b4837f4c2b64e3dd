"""The tutorial, command by command: each runs, and prints what the page shows, but for what is measured."""

import re
import shlex
from pathlib import Path

import pytest

from gdagrow.train import demo
from tests.command import call
from tests.e2e.test_docs import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
# Losses, differences, seconds and rates are another machine's, or a shorter training's. Counts and sizes are not.
MEASURED = re.compile(r"\d+\.\d+e[-+]\d+|\d+\.\d+%?|\d+%|[\d,]+(?= tokens/s)")
SIZES = re.compile(r"[\d.]+ (?:K|M|[km]?B|MB)\b")


def plain(text: str) -> list[str]:
    """Lines with measured figures masked, and without the alignment that goes with their width."""
    lines = []
    for line in text.splitlines():
        kept = SIZES.findall(line)
        masked = MEASURED.sub("#", SIZES.sub("@", line))
        lines.append(" ".join([*masked.split(), *kept]))
    return lines


def contains(output: str, excerpt: str) -> bool:
    found, wanted = plain(output), plain(excerpt)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


def test_the_tutorial_is_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    output, num_commands = "", 0
    for kind, content in BLOCKS:
        if kind == "yaml":
            Path("train-on.yaml").write_text(content)
        elif kind == "console":
            (line,) = content.splitlines()
            command = shlex.split(line.removeprefix("$ "))
            if command[0] == "gdagrow":
                outcome = call(capsys, *command[1:])
                assert outcome.code == 0, f"{line}: {outcome.err}"
                output = outcome.out
            else:
                assert command == ["python", "-m", "gdagrow.train.demo", "demo/source"]
                demo.run(Path("demo/source"), seconds=1)
                output = re.sub(r"^\d+ steps", "585 steps", capsys.readouterr().out, flags=re.MULTILINE)
            num_commands += 1
        else:
            assert kind == "text"
            assert contains(output, content), f"{output}\n\ndoes not have\n\n{content}"
    assert num_commands == 9


@pytest.mark.parametrize("excerpt", ["  loss 1.9, 30 steps\n", "  loss 1.98, 20 steps\n  in 2.5 MB\n", "nothing\n"])
def test_what_is_no_figure_is_compared(excerpt: str) -> None:
    output = "begin\n  loss  2.04, 20 steps\n  in 1.25 MB\n"
    assert contains(output, "loss 1.98, 20 steps\n  in 1.25 MB\n")
    assert not contains(output, excerpt)
