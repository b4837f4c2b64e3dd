"""Code in a checkpoint's files: every command reads, carries or refuses them, and none runs it."""

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gdagrow_cli.main import main

from tests.checkpoints import edit_json, write_checkpoint, write_distributed_state, write_training_state
from tests.command import call
from tests.trainings import write_recipe

ROOT = Path(__file__).parents[2]
TINY = {"groups": 1, "ratio": 3, "head_dim": 2, "hidden": 4, "ffn": 4, "vocab": 5, "layers": 1}
MARKER = "payload-was-run"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def by_global(marker: Path) -> bytes:
    return b"cos\nmkdir\n(V" + str(marker).encode() + b"\ntR."


def by_stack_global(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker), protocol=4)


def by_inst(marker: Path) -> bytes:
    return b"(V" + str(marker).encode() + b"\nios\nmkdir\n."


def by_object(marker: Path) -> bytes:
    return b"(cos\nmkdir\nV" + str(marker).encode() + b"\no."


def by_build(marker: Path) -> bytes:
    """`__setstate__` of what is made by a name that is admitted."""
    return b"ccollections\nOrderedDict\n)R(V__setstate__\ncos\nmkdir\ndbV" + str(marker).encode() + b"\nb."


def nested(marker: Path) -> bytes:
    return pickle.dumps({"state": {0: [({"exp_avg": (Payload(marker),)},)]}, "param_groups": []}, protocol=2)


def by_extension(_: Path) -> bytes:
    return b"\x80\x02\x82\x01)R."


def by_persistent_id(marker: Path) -> bytes:
    return b"(Vstorage\ncos\nmkdir\nV" + str(marker).encode() + b"\nVcpu\nK\x01tQ."


PICKLES = (by_global, by_stack_global, by_inst, by_object, by_build, nested, by_extension, by_persistent_id)


def zipped(pickled: bytes) -> bytes:
    """As `torch.save` writes it."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return written.getvalue()


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a payload would make; it is seen to be made where code is run, and not to be there at the end."""
    place = tmp_path / MARKER
    yield place
    assert not place.exists()


def test_the_payloads_are_ones(tmp_path: Path) -> None:
    for number, make in enumerate((by_global, by_stack_global, by_inst, by_object, nested)):
        marker = tmp_path / f"{MARKER}-{number}"
        pickle.loads(make(marker))
        assert marker.is_dir()


def commands(model: Path, *, text: Path, run: Path | None = None) -> Iterator[tuple[object, ...]]:
    """Every command that takes a checkpoint."""
    aside = model.parent / "made"
    yield "inspect", model
    yield "plan", model, "--signal-x2"
    yield "expand", model, aside / "grown", "--signal-x2"
    yield "expand", model, aside / "restarted", "--signal-x2", "--schedule", "restart"
    yield "expand", model, aside / "reset", "--signal-x2", "--moments", "reset"
    yield "convert", model, aside / "dcp", "--to", "dcp"
    yield "convert", model, aside / "safetensors", "--to", "safetensors"
    yield "export", model, aside / "exported"
    yield "export", model, aside / "coded", "--with-code"
    yield "diff", model, model, "--seqs", "1", "--length", "4"
    yield "diff", model, model, "--weights"
    yield "stats", model, "--seqs", "1", "--length", "4"
    yield "report", model, "--json", "--seqs", "1", "--length", "4", "--run", model
    yield "train", write_recipe(model.parent / "run.yaml", model={"directory": str(model)}), "--dry-run"


def run_all(model: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[int]]:
    """Exit codes by command."""
    (model.parent / "made").mkdir()
    codes: dict[str, list[int]] = {}
    for words in commands(model, text=model):
        outcome = call(capsys, *words)
        assert outcome.code in (0, 1, 2), (words, outcome)
        codes.setdefault(str(words[0]), []).append(outcome.code)
    return codes


def trained(model: Path) -> None:
    write_training_state(model, **TINY)
    torch.save({"python": 1}, model / "rng_state.pth")


def distributed(model: Path) -> None:
    write_checkpoint(model.parent / "whole", **TINY)
    write_distributed_state(model.parent / "whole", model)
    shutil.copy(model.parent / "whole/config.json", model)


@pytest.mark.parametrize("make", PICKLES, ids=lambda make: make.__name__)
def test_a_training_state_full_of_payloads(
    make: Callable[[Path], bytes], marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    trained(model)
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "rng_state_0.pth"):
        (model / file).write_bytes(zipped(make(marker)))
    for file in ("training_args.bin", "pytorch_model.bin", "optimizer.bin", "extra.pkl", "tokenizer.model"):
        (model / file).write_bytes(make(marker))
    codes = run_all(model, capsys)
    assert codes["expand"] == [2, 2, 2]
    assert codes["inspect"] == [0]


@pytest.mark.parametrize("make", PICKLES, ids=lambda make: make.__name__)
def test_metadata_that_is_a_payload(
    make: Callable[[Path], bytes], marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    distributed(model)
    (model / ".metadata").write_bytes(make(marker))
    assert {code for codes in run_all(model, capsys).values() for code in codes} == {2}


def test_chunks_and_values_that_are_payloads(marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    write_checkpoint(tmp_path / "whole", **TINY)
    write_distributed_state(tmp_path / "whole", model, loader=Payload(marker))
    shutil.copy(tmp_path / "whole/config.json", model)
    codes = run_all(model, capsys)
    assert codes["expand"] == [0, 2, 0]  # carried along as it is


REMOTE = f"import pathlib; pathlib.Path({MARKER!r}).mkdir()\n"


def test_remote_code(
    marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    write_checkpoint(model, **TINY)
    modules = (
        "modeling_motif",
        "configuration_motif",
        "tokenization_motif",
        "generate",
        "__init__",
        "conftest",
        "sitecustomize",
    )
    for name in modules:
        (model / f"{name}.py").write_text(REMOTE)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(REMOTE)
    auto_map = {
        "AutoConfig": "configuration_motif.C",
        "AutoModelForCausalLM": "modeling_motif.M",
        "AutoTokenizer": "tokenization_motif.T",
    }
    edit_json(
        model / "config.json",
        auto_map=auto_map,
        trust_remote_code=True,
        custom_pipelines={"x": {"impl": "modeling_motif.M"}},
    )
    codes = run_all(model, capsys)
    assert codes["expand"][0] == codes["diff"][0] == codes["stats"][0] == 0
    assert (tmp_path / "made/grown/modeling_motif.py").read_text() == REMOTE
    assert json.loads((tmp_path / "made/grown/config.json").read_text())["auto_map"] == auto_map


DAMAGE: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "optimizer": ("optimizer.pt", lambda marker: zipped(by_global(marker))),
    "schedule": ("scheduler.pt", lambda marker: zipped(by_stack_global(marker))),
    "random numbers": ("rng_state.pth", lambda marker: zipped(by_global(marker))),
    "random numbers, nested": ("rng_state.pth", lambda marker: zipped(nested(marker))),
    "a key that ends a process": ("rng_state.pth", lambda marker: zipped(b"})" + b"\x85" * 200_000 + b"K\x01s.")),
    "no zip": ("scheduler.pt", by_global),
    "torn schedule": ("scheduler.pt", lambda marker: zipped(b"}.")[:-40]),
    "torn state": ("trainer_state.json", lambda marker: b'{"global_step": 2'),
    "another state": ("trainer_state.json", lambda marker: b'{"global_step": 2, "code": "x"}'),
}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    recipe = write_recipe(run.parent / "r.yaml", steps=2, save_every=1, evaluate_every=0)
    assert main(["train", str(recipe), "--out", str(run), "--quiet"]) == 0
    shutil.rmtree(run / "model")
    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_goes_on_from_a_payload(
    damage: str, marker: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    file, make = DAMAGE[damage]
    (run / "checkpoint-2" / file).write_bytes(make(marker))
    (run / "checkpoint-2/training_args.bin").write_bytes(by_global(marker))
    longer = write_recipe(tmp_path / "longer.yaml", steps=3, save_every=1, evaluate_every=0)
    outcome = call(capsys, "train", longer, "--out", run, "--resume")
    assert outcome.code == 2, outcome
    assert file in outcome.err
    assert "Traceback" not in outcome.err


FORBIDDEN = {"eval", "exec", "__import__"} | {
    f"{module}.{name}"
    for module in ("pickle", "dill", "cloudpickle", "marshal", "joblib")
    for name in ("load", "loads")
}
FORBIDDEN_ENDS = {"Unpickler", "unsafe_load", "full_load", "import_module", "get_class_from_dynamic_module"}


def unsafe_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that may run what a file says, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN or name.rpartition(".")[2] in FORBIDDEN_ENDS:
                yield node.lineno, name
            if name.endswith("torch.load") and given.get("weights_only") != "True":
                yield node.lineno, "torch.load without weights_only"
            if name.endswith("np.load") and "allow_pickle" in given:
                yield node.lineno, "np.load with pickles"
            if "trust_remote_code" in given:
                yield node.lineno, "trust_remote_code"
            if name.endswith("YAML") and given.get("typ") != "'safe'":
                yield node.lineno, "YAML that is not safe"


def test_nothing_in_the_package_can_run_what_a_file_says() -> None:
    sources = [path for package in ("gdagrow", "cli") for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 150
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {what}"
        for path in sources
        for _, what in unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))
    }
    # What the process itself forked sends back through a pipe.
    assert found == {"gdagrow/verify/forked.py: pickle.load"}


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(x)", "torch.load(x, weights_only=False)", "torch.load(x, weights_only=flag)", "pickle.loads(x)",
        "eval(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "YAML()", "YAML(typ='unsafe')",
        "pickle.Unpickler(f)", "np.load(x, allow_pickle=True)",
    ],
)  # fmt: skip
def test_what_could_is_seen(code: str) -> None:
    assert list(unsafe_calls(ast.parse(code)))
