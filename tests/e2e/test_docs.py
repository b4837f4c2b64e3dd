"""What the documents show is true: every command in them runs, the CLI page is the CLI's own, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_checkpoint, write_distributed_state, write_training_state
from tests.command import call
from tests.diffllama import TOPOLOGIES, save_diffllama

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]


def commands(page: Path) -> list[str]:
    """The lines after `$` in the page's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def shown(page: Path) -> list[list[str]]:
    return [shlex.split(line) for line in commands(page) if line.startswith("gdagrow ") and "[" not in line]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What the tutorial shows is run, and compared, by test_docs_tutorial.py.
@pytest.mark.parametrize("page", [page for page in PAGES if shown(page) and page.stem != "tutorial"], ids=name)
def test_every_gdagrow_command_of_a_page_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "demo" / "source", vocab=256, groups=2, kv_groups=2, extra={})
    write_checkpoint(tmp_path / "Motif-2.6B", plain=True, ratio=1, groups=2, hidden=32, tied=True)
    if "gdagrow expand DiffLlama-0.3B" in page.read_text():
        save_diffllama(tmp_path / "DiffLlama-0.3B", TOPOLOGIES[0], dtype=torch.bfloat16)
    if "run/checkpoint-1000" in page.read_text():
        write_training_state(tmp_path / "run" / "checkpoint-1000")
    if "run/dcp-1000" in page.read_text():
        write_distributed_state(tmp_path / "demo" / "source", tmp_path / "run" / "dcp-1000")
    if "given:heads.yaml" in page.read_text():
        (example,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        (tmp_path / "heads.yaml").write_text(example)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "text.txt").write_text("the words to compare two models on " * 20)
    monkeypatch.chdir(tmp_path)
    for command in shown(page):
        # In this process, since importing torch sixty times over takes longer than all the rest.
        outcome = call(capsys, *command[1:])
        assert outcome.code == 0, f"{shlex.join(command)}: {outcome.err}"


@pytest.mark.parametrize("page", [ROOT / "docs" / "python-api.md"], ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "demo" / "source")
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Heads(num_groups=4, ratio=3, num_kv_groups=1)")
    assert (tmp_path / "demo" / "grown" / "growth.json").exists()


def test_the_readme_names_the_two_commands_that_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert {line for line in commands(ROOT / "README.md") if line.startswith("make ")} == {"make demo", "make test"}
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_cli_page_is_generated() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "typer", "gdagrow_cli.main", "utils", "docs", "--name", "gdagrow"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page.strip() == made.stdout.strip(), "docs/cli.md is not what --help says; run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
