"""The report as a reader meets it: a real browser shows every figure of `--json`, in light, dark and on paper."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from gdagrow_cli.main import main
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_checkpoint
from tests.chromium import DARK, LIGHT, Chromium, Seen, find_chromium

# Names and values that would do harm where they were taken for markup.
SOURCE, GROWN, TRAINED = "<b onclick='alert(1)'>source&amp;", "grown\"'><script>console.error(1)<", "trained"
EVIL = "</script><script>console.error('a config was run')</script>"


@dataclass(frozen=True)
class Made:
    """The page that a command wrote, and the JSON that it printed."""

    page: Path
    told: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("report")
    source, grown, trained = root / SOURCE, root / GROWN, root / TRAINED
    write_checkpoint(source, groups=2, kv_groups=2, layers=3, extra={"pad_token_id": EVIL})
    _say("expand", source, grown, "--uniform-x2", "--quiet")
    shutil.copytree(grown, trained)
    _disturb(trained)
    (root / "run").mkdir()
    lines = [{"step": step, "loss": 5 - step / 100, "note": "text"} for step in range(200)]
    (root / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--run", root / "run", "--seqs", 2, "--length", 32, "--out", root / "page.html", "--json")
    return Made(root / "page.html", json.loads(_say("report", source, grown, trained, *words)))


def _say(*words: object) -> str:
    """What a command line prints, in this process."""
    with redirect_stdout(StringIO()) as out:
        assert main([str(word) for word in words]) == 0
    return out.getvalue()


def _disturb(checkpoint: Path) -> None:
    """Let one layer differ by more than rounding, as after training, and the norm by a setting."""
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = weights[name] * torch.linspace(0.9, 1.1, weights[name].shape[1]).bfloat16()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "x_setting": EVIL}))


@pytest.fixture(scope="module")
def browser() -> Chromium:
    found = find_chromium()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def loaded(made: Made, browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return browser.open(made.page, tmp_path_factory.mktemp("profile"), "--dump-dom")


class Figures(HTMLParser):
    """What the elements of a page with `data-figure` say: by path, their full value and their texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.values: dict[str, list[Any]] = {}
        self.texts: dict[str, list[str]] = {}
        self.scripts: list[Mapping[str, str | None]] = []
        self._open: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script":
            self.scripts.append(given)
        path = given.get("data-figure")
        if path is not None:
            self.values.setdefault(path, []).append(json.loads(given["data-value"] or ""))
        self._open = path if tag in ("span", "g") else self._open if tag == "title" else None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts.setdefault(self._open, []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def at(told: Any, path: str) -> Any:
    for key in path.split("."):
        told = told[int(key)] if isinstance(told, list) else told[key]
    return told


def expected(told: dict[str, Any]) -> Iterator[str]:
    """Paths of the figures that a page must show."""
    models = {"source": told["source"], **{f"grown.{i}.model": g["model"] for i, g in enumerate(told["grown"])}}
    for path, model in models.items():
        for key in ("num_parameters", "weight_bytes", "heads.ratio", "heads.num_signal_heads", "sizes.hidden"):
            yield f"{path}.figures.{key}"
        yield from (f"{path}.figures.parameters.{part}" for part in model["figures"]["parameters"])
        for i, layer in enumerate(model["attention"]["layers"]):
            yield from (f"{path}.attention.layers.{i}.{key}" for key in ("lambda",))
            for kind in ("signal", "noise", "difference"):
                keys = ["entropy", "top_5_percent"] + ["negative"] * (kind == "difference")
                yield from (f"{path}.attention.layers.{i}.{kind}.{key}.{head}"
                            for key in keys for head in range(len(layer[kind][key])))  # fmt: skip
        for i, tensor in enumerate((model["clones"] or {"tensors": ()})["tensors"]):
            if tensor["layer"] is not None:
                yield from (f"{path}.clones.tensors.{i}.heads.{head}.relative_distance"
                            for head in range(len(tensor["heads"])))  # fmt: skip
                yield from (f"{path}.clones.tensors.{i}.{key}" for key in ("cosine", "relative_distance"))
    for i, grown in enumerate(told["grown"]):
        for key in ("max_abs", "max_rel", "tolerance", "kl", "top1_agreement", "source_loss", "grown_loss"):
            yield f"grown.{i}.comparison.{key}"
        yield from (f"grown.{i}.certificate.{key}" for key in ("num_tensors", "num_elements"))
        yield from (f"grown.{i}.comparison.parts.{j}.max_rel"
                    for j, part in enumerate(grown["comparison"]["parts"]) if part["layer"] is not None)  # fmt: skip
    yield from (f"runs.0.curves.0.{key}" for key in ("num_points", "steps.199", "values.199"))


def test_the_browser_shows_every_figure_of_the_json(made: Made, loaded: Seen) -> None:
    figures = Figures(loaded.out)
    paths = list(expected(made.told))
    assert len(paths) > 400
    assert [path for path in paths if path not in figures.values] == []
    wrong = {path: values for path, values in figures.values.items() if set(values) != {at(made.told, path)}}
    assert wrong == {}


def test_the_texts_say_the_values(made: Made, loaded: Seen) -> None:
    texts = Figures(loaded.out).texts
    comparison, figures = made.told["grown"][1]["comparison"], made.told["source"]["figures"]
    assert texts["grown.1.comparison.max_rel"] == [f"{comparison['max_rel']:.3g}"]
    assert texts["grown.1.comparison.top1_agreement"] == [f"{comparison['top1_agreement']:.2%}"]
    assert f"{figures['num_parameters'] / 1000:.2f} K" in texts["source.figures.num_parameters"]
    assert texts["source.figures.heads.ratio"][0] == "3:1"
    entropy = made.told["source"]["attention"]["layers"][2]["noise"]["entropy"][1]
    assert f"layer 2, noise head of group 1: {entropy:.4g}" in texts["source.attention.layers.2.noise.entropy.1"]


def test_the_page_holds_what_json_prints(made: Made, loaded: Seen) -> None:
    for page in (made.page.read_text(), loaded.out):
        (data,) = re.findall(r'<script type="application/json" id="gdagrow-report">(.*?)</script>', page, re.DOTALL)
        assert json.loads(data) == made.told


def test_verdicts(made: Made, loaded: Seen) -> None:
    assert [grown["comparison"]["equivalent"] for grown in made.told["grown"]] == [True, False]
    badges = re.findall(r'<span class="badge (\w+)">([^<]*)</span>', loaded.out)
    # In the overview, over the section, and beside each evidence.
    assert badges.count(("good", "logits within rounding")) == badges.count(("bad", "logits differ")) == 2
    assert badges.count(("good", "the same function")) == badges.count(("bad", "different")) == 2
    first = made.told["grown"][1]["comparison"]["first_difference"]
    assert (first["layer"], first["part"]) == (1, "attention")
    assert first["head"] is None or first["head"] in loaded.out


def test_nothing_is_told_to_the_console_and_nothing_is_asked_for(loaded: Seen) -> None:
    assert loaded.console == ()


def test_the_console_would_be_heard(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    policy = "default-src 'none'; script-src 'unsafe-inline'"
    page.write_text(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
                    '<img src="http://127.0.0.1:9/x.png"><script>console.error("on purpose")</script>')  # fmt: skip
    seen = browser.open(page, tmp_path / "profile", "--dump-dom")
    assert any("violates the following Content Security Policy" in line for line in seen.console)
    assert any('"on purpose"' in line for line in seen.console)


def test_names_and_settings_stay_text(made: Made, loaded: Seen) -> None:
    told = loaded.out.replace("&quot;", '"')  # which a browser need not escape in text
    assert "&lt;b onclick='alert(1)'&gt;source&amp;amp;" in told
    assert EVIL not in made.page.read_text()
    assert "&lt;/script&gt;&lt;script&gt;console.error('a config was run')" in told  # the setting that differs
    assert [script.get("type") for script in Figures(loaded.out).scripts] == ["application/json"]
    assert not re.search(r"<[^>]*\sonclick=", loaded.out)


def test_the_page_names_no_address(made: Made) -> None:
    page = made.page.read_text()
    assert not re.search(r"https?:|//[a-z]", page)
    assert (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'" in page
    )
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def picture(browser: Chromium, page: Path, to: Path, *options: str) -> Image.Image:
    browser.open(page, to.with_suffix(".profile"), f"--screenshot={to}", *options)
    with Image.open(to) as image:
        return image.convert("RGB")


def brightness(image: Image.Image) -> float:
    """The mean of all pixels, from 0 for black to 1."""
    histogram = image.convert("L").histogram()
    return sum(level * count for level, count in enumerate(histogram)) / (255 * sum(histogram))


def test_light_and_dark(made: Made, browser: Chromium, tmp_path: Path) -> None:
    light, dark = (picture(browser, made.page, tmp_path / f"{i}.png", mode, "--window-size=1180,2400")
                   for i, mode in enumerate((LIGHT, DARK)))  # fmt: skip
    assert light.size == dark.size == (1180, 2400)
    assert brightness(light) > 0.85
    assert brightness(dark) < 0.25
    for image in (light, dark):
        colours = image.getcolors(maxcolors=2**24) or []
        assert len(colours) > 100  # text, charts and heat maps, not a blank sheet
        ground, _ = max(colours)
        assert 0.5 < ground / (1180 * 2400) < 0.97


@pytest.mark.parametrize("place", ["source", "grown-1-logits", "grown-1-clones", "training"])
def test_on_a_phone_nothing_reaches_beyond_the_sides(made: Made, browser: Chromium, tmp_path: Path, place: str) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="{made.page.as_uri()}#{place}" width="375" height="2500" '
                     'style="border:0" scrolling="no"></iframe>')  # fmt: skip
    image = picture(browser, frame, tmp_path / "phone.png", LIGHT, "--window-size=500,2500").crop((0, 0, 375, 2500))
    assert len(image.getcolors(maxcolors=2**24) or []) > 50
    for left in (0, 361):  # both margins of 16 pixels are empty
        assert image.crop((left, 0, left + 14, 2500)).getcolors() == [(14 * 2500, (255, 255, 255))]


def test_it_prints_light_whatever_the_screen(made: Made, browser: Chromium, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    browser.open(made.page, tmp_path / "profile", DARK, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    pages = len(re.findall(rb"/Type /Page\b", pdf.read_bytes()))
    assert 4 <= pages <= 20
    assert pdf.stat().st_size > 50_000
    if shutil.which("pdftotext") is None or shutil.which("pdftoppm") is None:
        return
    subprocess.run(["pdftoppm", "-r", "20", "-png", pdf, tmp_path / "sheet"], check=True)
    sheets = sorted(tmp_path.glob("sheet*.png"))
    assert len(sheets) == pages
    for sheet in sheets:
        with Image.open(sheet) as image:
            assert brightness(image) > 0.8
    text = subprocess.run(["pdftotext", "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout
    for heading in ("Heads and their lineage", "Error of each part, by layer", "How like the copies are", "Training"):
        assert heading in text
    # Folded on a screen, open on paper.
    assert "model.layers.{layer}.self_attn.o_proj.weight" in text
