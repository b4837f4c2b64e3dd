"""The site: built with warnings as errors, every page reached from the start page, nothing on it asks for a network."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.chromium import DARK, LIGHT, Chromium, find_chromium
from tests.e2e.test_docs import ROOT

DOCS = ROOT / "docs"
_LOADED = re.compile(r"""<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)="([^"]*)\"""")
_LINKED = re.compile(r"""<a\b[^>]*?\bhref="([^"]*)\"""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--doctree-dir",
         str(out / "doctrees"), str(DOCS), str(out / "html")], capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return out / "html"


def pages(site: Path) -> list[Path]:
    return [page for page in site.rglob("*.html") if "_static" not in page.parts]


def test_every_page_is_reached_from_the_start(site: Path) -> None:
    made = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    links = {unescape(link) for link in _LINKED.findall((site / "index.html").read_text())}
    assert made - {"index.html"} <= links


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert len(pages(site)) > 30
    for page in pages(site):
        text = page.read_text()
        local = {link for link in _LINKED.findall(text) if not urlsplit(link).scheme}
        for target in {*_LOADED.findall(text), *local}:
            parts = urlsplit(unescape(target))
            assert (parts.scheme, parts.netloc) == ("", ""), f"{page}: {target}"
            found = page.parent / unquote(parts.path) if parts.path else page
            assert found.exists(), f"{page}: {target}"
            if parts.fragment and found.suffix == ".html":
                assert f'id="{parts.fragment}"' in found.read_text(), f"{page}: {target}"


def test_what_is_public_is_described(site: Path) -> None:
    rows = re.findall(r"^\| \[.*\((python/.*\.md)\).*\|(.*)\|$", (DOCS / "python-api.md").read_text(), re.MULTILINE)
    assert len(rows) == len(list((DOCS / "python").iterdir()))
    for page, modules in rows:
        described = re.findall(r"automodule:: gdagrow\.(\S+)", (DOCS / page).read_text())
        assert re.findall(r"`([\w.]+)`", modules) == described
    grown = (site / "python" / "growing.html").read_text()
    for name in ("gdagrow.growing.grow_checkpoint", "gdagrow.recipe.Recipe", "gdagrow.errors.GdagrowError"):
        assert f'id="{name}"' in grown
    # A docstring's lines `field: meaning` are a list.
    assert re.search(r"<strong>snr_db</strong>.*?How far below the weights", grown, re.DOTALL)


@pytest.mark.parametrize(("width", "scheme"), [(390, DARK), (1280, LIGHT)], ids=["phone-dark", "desk-light"])
def test_a_browser_shows_it_without_a_complaint(site: Path, tmp_path: Path, width: int, scheme: str) -> None:
    browser = find_chromium()
    assert isinstance(browser, Chromium), browser
    for page in ("index.html", "tutorial.html", "python/growing.html"):
        seen = browser.open(
            site / page, tmp_path / "profile", f"--window-size={width},900", scheme, "--virtual-time-budget=500",
            "--dump-dom",
        )  # fmt: skip
        assert seen.console == ()
        assert "<h1>" in seen.out


def test_its_search_finds_without_a_server(site: Path, tmp_path: Path) -> None:
    browser = find_chromium()
    assert isinstance(browser, Chromium), browser
    seen = browser.open(
        site / "search.html", tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom", query="?q=hypercloning"
    )
    assert seen.console == ()
    found = re.findall(r'<li class="kind-\w+"><a href="([^"]+)"', seen.out)
    assert sorted(found) == ["cli.html", "compare-with-uniform.html", "index.html", "python/growing.html"]
