"""What is released: a wheel and a source archive of it, installed where nothing is but the core dependencies."""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import gdagrow
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
# What of the tree is in the source archive: all but what the gate and git want.
SOURCES = {
    "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "benchmarks", "cli", "docs", "gdagrow",
    "recipes", "tests",
}  # fmt: skip
OF_THE_ARCHIVE = {"PKG-INFO", ".gitignore"}
IGNORED = {"__pycache__"}

# What needs no extra, in an order that makes what it needs; each exits with 0.
WITHOUT_EXTRAS = (
    "inspect demo/source",
    "plan demo/source --signal-x2 --noise-x2",
    "plan demo/source --budget 100K --compare",
    "expand demo/source demo/grown --signal-x2 --noise-x2 --quiet",
    "diff demo/source demo/grown",
    "diff demo/source demo/grown --weights",
    "diff demo/source demo/grown --gradients",
    "diff demo/source demo/grown --text text.txt",
    "convert demo/grown demo/dcp --to dcp --quiet",
    "inspect demo/dcp",
    "stats demo/grown --seqs 1 --length 16",
    "export demo/grown demo/published --with-code --quiet",
    "report demo/source demo/grown --json --seqs 1 --length 16",
    "train recipes/train/continue.yaml --dry-run",
)
# What does, and the extra that its error names; each exits with 2.
WITH_EXTRAS = {
    "diff demo/subwords demo/grown --text text.txt": "pip install 'gdagrow[text]'",
    "report demo/source demo/grown --out demo/page.html": "pip install 'gdagrow[report]'",
    "train recipes/train/continue.yaml --out demo/run": "pip install 'gdagrow[train]'",
    "experiment recipes/experiments/growth.yaml --quick --out demo/experiment": "pip install 'gdagrow[experiment]'",
}

# In one process, since importing torch for each of them takes longer than all the rest.
COMMANDS = """
import contextlib, io, json, sys
from gdagrow_cli.main import main

found = {}
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line.split())
    found[line] = [code, err.getvalue()]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Release:
    """What was built, and where the wheel is installed."""

    wheel: Path
    archive: Path
    again: Path  # the wheel built from the archive
    bin: Path


def _build(source: Path, out: Path, *targets: str) -> Iterator[Path]:
    words = [word for target in targets for word in ("--target", target)]
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", *words, "--directory", str(out)],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    yield from (next(out.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[target])) for target in targets)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    place = tmp_path_factory.mktemp("release")
    wheel, archive = _build(ROOT, place / "dist", "wheel", "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    (again,) = _build(place / f"gdagrow-{gdagrow.__version__}", place / "again", "wheel")
    return Release(wheel, archive, again, _installed(wheel, place / "venv"))


def _installed(wheel: Path, venv: Path) -> Path:
    """A new virtual environment with the wheel and what it requires without extras, and nothing else; returns its bin.

    What is required comes from the environment of the tests, by links, since its download would take minutes.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for top in sorted(_tops_of_core()):
        (site / top.name).symlink_to(top)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet", "--no-deps",
         "--no-index", "--disable-pip-version-check", str(wheel)], check=True,
    )  # fmt: skip
    return venv / "bin"


def _tops_of_core() -> set[Path]:
    """What is in site-packages for the wheel's requirements without extras, and for what those require in turn."""
    (project,) = re.findall(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    wanted, seen, tops = re.findall(r'^ *"(.*)",$', project, re.M), set(), set()
    while wanted:
        requirement = Requirement(wanted.pop())
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            pytest.fail(f"{requirement.name} is not installed here, and the wheel's dependencies require it")
        for file in found.files or ():
            if file.parts[0] not in ("..", "__pycache__"):
                tops.add(Path(str(found.locate_file(file.parts[0]))))
        for told in found.requires or ():
            marker = Requirement(told).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                wanted.append(told)
    return tops


def _content(archive: ZipFile) -> dict[str, bytes]:
    return {name: archive.read(name) for name in archive.namelist()}


def _tree(*tops: str) -> set[str]:
    paths = (path for top in tops for path in ((ROOT / top).rglob("*") if (ROOT / top).is_dir() else [ROOT / top]))
    return {
        path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and not IGNORED.intersection(path.parts)
    }


def test_the_wheel_has_the_packages_and_nothing_else(release: Release) -> None:
    about = f"gdagrow-{gdagrow.__version__}.dist-info"
    with ZipFile(release.wheel) as archive:
        names = set(archive.namelist())
    assert names == {
        *(name.removeprefix("cli/") for name in _tree("gdagrow", "cli")),
        *(f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")),
    }
    assert {"gdagrow/py.typed", "gdagrow_cli/py.typed"} <= names


def test_the_archive_has_all_that_the_tests_need_and_makes_the_same_wheel(release: Release) -> None:
    with tarfile.open(release.archive) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
    assert files == _tree(*SOURCES) | OF_THE_ARCHIVE
    with ZipFile(release.wheel) as wheel, ZipFile(release.again) as again:
        assert _content(wheel) == _content(again)


def test_the_metadata_says_what_it_is(release: Release) -> None:
    with ZipFile(release.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        told = Parser().parsestr(archive.read(name).decode())
    assert told["Version"] == gdagrow.__version__
    assert told["Requires-Python"] == ">=3.10"
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text()
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)]
    assert set(versions) <= set(told.get_all("Classifier"))


def test_installed_alone_it_does_all_that_needs_no_extra_and_says_which_the_rest_needs(
    release: Release, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "demo" / "source", extra={}, vocab=256)
    write_checkpoint(tmp_path / "demo" / "subwords", extra={}, vocab=256, companions=True)
    (tmp_path / "text.txt").write_text("the words to compare two models on " * 20)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    lines = [*WITHOUT_EXTRAS, *WITH_EXTRAS]
    done = _run(release.bin / "python", "-c", COMMANDS, cwd=tmp_path, stdin=json.dumps(lines))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {line: found[line] for line in WITHOUT_EXTRAS} == {line: [0, ""] for line in WITHOUT_EXTRAS}
    for line, extra in WITH_EXTRAS.items():
        code, error = found[line]
        assert code == 2, line
        assert error.count("\n") == 1, error
        assert extra in error, error


def test_the_model_for_transformers_says_which_extra_it_needs(release: Release, tmp_path: Path) -> None:
    done = _run(release.bin / "python", "-c", "import gdagrow.models.hf", cwd=tmp_path)
    last = "ModuleNotFoundError: gdagrow.models.hf needs the transformers package: pip install 'gdagrow[hf]'"
    assert done.stderr.splitlines()[-1] == last


def test_the_command_and_its_module_say_the_version(release: Release, tmp_path: Path) -> None:
    for words in ([release.bin / "gdagrow"], [release.bin / "python", "-m", "gdagrow_cli"]):
        done = _run(*words, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"gdagrow {gdagrow.__version__}\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("gdagrow ex", ["expand", "export", "experiment"]),
        ("gdagrow diff a b --we", ["--weights"]),
        ("gdagrow plan source --signal-x2 --no", ["--noise-x"]),
        ("gdagrow convert a b --to ", ["dcp", "safetensors"]),
        ("gdagrow stats a --dtype f", ["float64", "float32"]),
        ("gdagrow expand a --moments ", ["auto", "carry", "reset"]),
        ("gdagrow inspect ", []),  # bash then offers files
    ],
)
def test_bash_offers_commands_options_and_their_values(
    release: Release, tmp_path: Path, typed: str, offered: list[str]
) -> None:
    script = f"""
        export PATH={release.bin}:$PATH
        source <(gdagrow --show-completion bash)
        COMP_WORDS=({typed} ''); [[ "{typed}" == *' ' ]] || unset 'COMP_WORDS[-1]'
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _gdagrow_completion gdagrow
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = _run("bash", "--norc", "-c", script, cwd=tmp_path, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same_without_torch(release: Release, tmp_path: Path, shell: str) -> None:
    told = "import sys\nfrom gdagrow_cli.main import main\ncode = main()\nsys.exit('torch' in sys.modules or code)"
    done = _run(
        release.bin / "python", "-c", told, cwd=tmp_path, _GDAGROW_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="gdagrow convert a b --to ", _TYPER_COMPLETE_FISH_ACTION="get-args",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"dcp", "safetensors"} <= set(re.findall(r"\w+", done.stdout))


def _run(
    *words: str | Path, cwd: Path, stdin: str | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "COLUMNS": "1000", **environment}
    return subprocess.run([*map(str, words)], cwd=cwd, env=clean, input=stdin, capture_output=True, text=True)
