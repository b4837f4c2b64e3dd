"""`gdagrow report`: what it refuses before any work, and what it says of models that cannot be measured."""

import json
import subprocess
import sys
from pathlib import Path

import gdagrow_cli.report_view
import pytest

from tests.checkpoints import write_checkpoint
from tests.command import call

FEW = ("--seqs", 1, "--length", 8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", layers=1)
    return tmp_path / "source"


def test_it_must_be_told_where_to_write(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "report", source)
    assert (outcome.code, outcome.out) == (2, "")
    assert (
        outcome.err == "error: report writes a page: say where with --out FILE.html, or ask for its data with --json\n"
    )


def test_a_page_is_replaced_only_by_force(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    outcome = call(capsys, "report", source, "--out", page, *FEW)
    assert (outcome.code, outcome.err) == (
        2,
        f"error: {page} exists; choose another output, or replace it with --force\n",
    )
    assert page.read_text() == "mine"
    outcome = call(capsys, "report", source, "--out", page, "--force", *FEW)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"wrote {page}\n")
    assert page.read_text().startswith("<!doctype html>")


def test_without_the_extra_it_names_the_extra(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gdagrow_cli.report_view, "find_spec", lambda _: None)
    outcome = call(capsys, "report", source, "--out", tmp_path / "page.html")
    assert outcome.code == 2
    assert "pip install 'gdagrow[report]'" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_data_needs_no_extra(source: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\nfrom gdagrow_cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, "report", str(source), "--json", *map(str, FEW)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["source"]["figures"]["heads"]["ratio"] == 3


@pytest.mark.parametrize("words", [("--run", "."), ("--device", "nowhere"), ("nothing-there",), ("--text", "none")])
def test_nothing_is_written_where_something_is_wrong(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call(capsys, "report", source, *words, "--out", "page.html", *FEW)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_cannot_be_measured_is_told_on_the_page(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of another vocabulary, and one that the reference model does not run."""
    write_checkpoint(tmp_path / "other", vocab=30, layers=1)
    write_checkpoint(tmp_path / "scaled", layers=1, extra={"rope_scaling": {"type": "linear", "factor": 2}})
    words = ("report", source, tmp_path / "other", tmp_path / "scaled", "--out", tmp_path / "page.html", "--json")
    outcome = call(capsys, *words, *FEW)
    assert outcome.code == 0
    other, scaled = json.loads(outcome.out)["grown"]
    assert set(other["problems"]) == {"lineage", "certificate", "comparison"}
    assert set(other["model"]["problems"]) == {"attention"}
    assert (other["certificate"], other["comparison"], other["model"]["attention"]) == (None, None, None)
    assert set(scaled["problems"]) == {"comparison"}
    assert set(scaled["model"]["problems"]) == {"attention"}
    page = (tmp_path / "page.html").read_text()
    for told in (*other["problems"].values(), scaled["model"]["problems"]["attention"]):
        assert told.replace("'", "&#x27;") in page
    assert page.count("logits not compared") == 4


def test_a_page_about_one_model(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown = tmp_path / "grown"
    assert call(capsys, "expand", source, grown, "--uniform-x2", "--quiet").code == 0
    pages = []
    for name in ("a.html", "b.html"):
        assert call(capsys, "report", grown, "--out", tmp_path / name, *FEW).code == 0
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]
    assert "Grown from <b>source</b>: signal &times;2, noise &times;2, kv &times;2" in pages[0]
    assert "How like the copies are" in pages[0]
    assert "held against the source" not in pages[0]
