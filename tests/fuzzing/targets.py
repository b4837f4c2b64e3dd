"""Every kind of file that gdagrow reads: small real ones, and the entry points that read them."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from gdagrow_cli.main import EXIT_BUG, main

from gdagrow.checkpoint import read_checkpoint
from gdagrow.costs import checkpoint_figures
from gdagrow.errors import GdagrowError
from gdagrow.experiment.arms import make_arms
from gdagrow.experiment.recipe import read_experiment
from gdagrow.experiment.results import read_results, write_results
from gdagrow.formats.dcp_metadata import read_metadata
from gdagrow.formats.dcp_reader import DcpReader
from gdagrow.formats.torch_file import read_torch_file
from gdagrow.growing import grow_checkpoint, prepare_growth
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe, read_recipe
from gdagrow.record import growths_of
from gdagrow.report.training import read_run
from gdagrow.states.moments import Schedule
from gdagrow.states.optimizer_file import read_optimizer
from gdagrow.states.trainer_checkpoint import files_of_state
from gdagrow.train.data import open_tokens
from gdagrow.train.dry_run import forecast
from gdagrow.train.metrics import metrics_lines
from gdagrow.train.recipe import DataSource, read_train_recipe
from gdagrow.train.run_directory import last_state
from gdagrow.train.state_files import read_state
from gdagrow.verify.ancestry import ancestry_from, last_growth, whole_ancestry
from tests.checkpoints import write_checkpoint, write_distributed_state, write_training_state
from tests.experiments import experiment
from tests.fuzzing import mutation
from tests.fuzzing.mutation import Mutator
from tests.made_results import growth_results
from tests.trainings import recipe as training

# One input in so many goes through what takes longer: a growth that is carried out, a command that prints.
THOROUGH: Final = 100

Read = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    share: Of a hundred inputs, about so many.
    make: Writes the checkpoint that the file belongs to into a directory, and returns the file's place, the contents
        to begin with (each of which is read), and what reads the file; that gets the number of the input.
    """

    name: str
    share: float
    mutate: Mutator
    make: Callable[[Path], tuple[Path, Sequence[bytes], Read]]


TINY: Final[Mapping[str, Any]] = {
    "groups": 1, "ratio": 3, "head_dim": 2, "hidden": 4, "ffn": 4, "vocab": 5, "layers": 1,
}  # fmt: skip
_GROW: Final = make_recipe({"signal": 2})


def _planned(model: Path, number: int, **recipe: Any) -> None:
    """Everything that a growth does of a checkpoint before weights are read; sometimes all of it, and `inspect`."""
    header = read_checkpoint(model)
    checkpoint_figures(header)
    growths_of(model)
    asked = make_recipe(recipe) if recipe else _GROW
    if number % THOROUGH:
        make_plan(header, asked)
        return
    _call("inspect", model)
    _call("inspect", model, "--json")
    grown = model.parent / "grown"
    try:
        grow_checkpoint(model, grown, asked)
    finally:
        shutil.rmtree(grown, ignore_errors=True)


def _call(*words: object) -> None:
    """Run a command, which must not call anything a bug."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in words])
    assert code != EXIT_BUG, said.getvalue()


def _of_model(file: str, *, index: bool = False, **topology: Any) -> Callable[[Path], tuple[Path, list[bytes], Read]]:
    def make(directory: Path) -> tuple[Path, list[bytes], Read]:
        model = directory / "model"
        write_checkpoint(model, **{**TINY, **topology}, **({"max_shard_bytes": 300} if index else {}))
        path = model / file
        return path, [path.read_bytes()], lambda number: _planned(model, number)

    return make


def _config(directory: Path) -> tuple[Path, list[bytes], Read]:
    path, corpus, read = _of_model("config.json")(directory)
    (directory / "other").mkdir()
    others = [
        {"plain": True, "ratio": 1, "groups": 2, "head_dim": 2, "hidden": 8},
        {"tied": True, "activation": "silu"},
    ]
    for other in others:
        write_checkpoint(directory / "other", **{**TINY, **other})
        corpus.append((directory / "other/config.json").read_bytes())
    return path, corpus[:1], read


def _diffllama(directory: Path) -> tuple[Path, list[bytes], Read]:
    from tests.diffllama import save_diffllama  # which takes longer to import than all else here

    model = directory / "model"
    save_diffllama(model, (8, 4, 1, 4, 4, 2, False), dtype=torch.float32)
    path = model / "config.json"
    return path, [path.read_bytes()], lambda number: _planned(model, number, signal=2, to="motif")


def _record(directory: Path) -> tuple[Path, list[bytes], Read]:
    """Of one growth and of two; both read as that of the model that grew twice."""
    write_checkpoint(directory / "source", **TINY)
    grow_checkpoint(directory / "source", directory / "once", make_recipe({"signal": 2, "depth": 1}))
    model = directory / "model"
    grow_checkpoint(directory / "once", model, make_recipe({"hidden_to": 6, "noise": 2, "kv": 2}))
    path = model / "growth.json"
    before, between, after = (
        checkpoint_figures(read_checkpoint(directory / name)).sizes for name in ("source", "once", "model")
    )
    corpus = [path.read_bytes(), (directory / "once/growth.json").read_bytes()]

    def read(number: int) -> None:
        for sizes in (after, between):
            with contextlib.suppress(GdagrowError):
                last_growth(model, sizes)
            with contextlib.suppress(GdagrowError):
                whole_ancestry(path, sizes)
            with contextlib.suppress(GdagrowError):
                ancestry_from(model, before, sizes, untied=False)
        _planned(model, number, signal=2)
        if number % THOROUGH == 0:
            _call("diff", directory / "source", model, "--weights")

    return path, corpus, read


_RECIPES: Final = (
    {"signal": 2, "noise": 2, "kv": 1, "hidden": 2, "snr_db": 40.0, "seed": 7},
    {"signal": "4:1", "select": "first", "ffn_to": 9, "exact_copies": True},
    {"uniform": 2}, {"depth": 2, "insert": "after:0,0"}, {"layers": 4, "insert": "even", "rope_theta": 20000.0},
    {"like": "motif-2.6b"}, {"max_position_embeddings": 256, "signal": 3},
)  # fmt: skip


def _recipe(directory: Path) -> tuple[Path, list[bytes], Read]:
    write_checkpoint(directory / "model", **{**TINY, "activation": "silu"})
    header, path = read_checkpoint(directory / "model"), directory / "recipe.yaml"

    def read(number: int) -> None:
        recipe = make_recipe(read_recipe(path), f"recipe {path}")
        _ = recipe.label, recipe.as_dict()
        if number % THOROUGH == 0:
            _call("plan", directory / "model", "--recipe", path)
            prepare_growth(directory / "model", recipe)
        make_plan(header, recipe)

    return path, [json.dumps(recipe).encode() for recipe in _RECIPES], read


def _selection(directory: Path) -> tuple[Path, list[bytes], Read]:
    write_checkpoint(directory / "model", **{**TINY, "groups": 2, "layers": 2})
    header, path = read_checkpoint(directory / "model"), directory / "selection.yaml"
    recipe = make_recipe({"signal": "4:1", "select": f"given:{path}"})
    chosen: Sequence[Any] = (
        {"layers": {"*": [1, 2, 1]}}, {"layers": {"*": [[1, 1, 2], [2, 1, 1]]}}
    )  # fmt: skip
    return path, [json.dumps(layers).encode() for layers in chosen], lambda _: void(make_plan(header, recipe))


def _like(directory: Path) -> tuple[Path, list[bytes], Read]:
    write_checkpoint(directory / "model", **TINY)
    path = directory / "config.json"
    target = write_checkpoint(directory / "target", **{**TINY, "ratio": 6, "hidden": 6, "layers": 3})
    recipe = make_recipe({"like": str(path)})
    return path, [json.dumps(target).encode()], lambda _: void(prepare_growth(directory / "model", recipe))


def _training(directory: Path) -> tuple[Path, list[bytes], Read]:
    path = directory / "run.yaml"
    growths = [
        {"at": 4, "expand": {"signal": 2}, "freeze": {"heads": "old", "steps": 2}},
        {"at": 6, "expand": {"layers": 3}},
    ]
    corpus = [
        training(), training(growth=growths, schedule={"kind": "wsd", "decay": 2}),
        training(optimizer={"name": "muon", "learning_rate": 1e-3}, freeze={"layers": [0], "steps": 2}),
    ]  # fmt: skip

    def read(number: int) -> None:
        recipe = read_train_recipe(path)
        recipe.as_dict()
        forecast(recipe, 1)
        if number % THOROUGH == 0:
            _call("train", path, "--dry-run")

    return path, [json.dumps(recipe).encode() for recipe in corpus], read


def _experiment(directory: Path) -> tuple[Path, list[bytes], Read]:
    path = directory / "experiment.yaml"
    quick = {"scales": {"quick": {"base": {"steps": 6}, "grow_at": 2, "seeds": [3, 4], "arms": {"uniform": None}}}}
    corpus = [experiment(), experiment(tune={"learning_rates": [1e-3, 2e-3], "steps": 4, "seed": 9}, **quick)]

    def read(number: int) -> None:
        make_arms(read_experiment(path, "quick" if number % 2 else None), directory)

    return path, [json.dumps(recipe).encode() for recipe in corpus], read


def _trainer_state(directory: Path) -> tuple[Path, list[bytes], Read]:
    model, path = directory / "model", directory / "model/trainer_state.json"
    write_training_state(model, **TINY)
    log = [{"loss": 2.5, "step": 1, "learning_rate": 1e-3}, {"eval_loss": 2.25, "step": 2}, {"loss": 2.0, "step": 2}]
    state = {
        "epoch": 0.5,
        "global_step": 2,
        "max_steps": 10,
        "log_history": log,
        "best_metric": 2.0,
        "total_flos": 1e12,
    }
    corpus = [path.read_bytes(), json.dumps(state).encode()]

    def read(number: int) -> None:
        with contextlib.suppress(GdagrowError):
            read_run(model)
        for schedule in Schedule:
            with contextlib.suppress(GdagrowError):
                files_of_state(model, schedule)
        if number % THOROUGH == 0:
            prepare_growth(model, _GROW)
        files_of_state(model, Schedule.keep)

    return path, corpus, read


def _optimizer(directory: Path) -> tuple[Path, list[bytes], Read]:
    model, path = directory / "model", directory / "model/optimizer.pt"
    write_training_state(model, **TINY)
    header = read_checkpoint(model)

    def read(number: int) -> None:
        read_optimizer(header)
        if number % 10 == 0:
            prepare_growth(model, _GROW, moments="carry" if number % 2 else "reset")

    return path, [path.read_bytes()], read


def _scheduler(directory: Path) -> tuple[Path, list[bytes], Read]:
    model, path = directory / "model", directory / "model/scheduler.pt"
    write_training_state(model, **TINY)
    (model / "trainer_state.json").unlink()

    def read(number: int) -> None:
        with contextlib.suppress(GdagrowError):
            read_torch_file(path)
        files_of_state(model, Schedule.restart)

    return path, [path.read_bytes()], read


def _metadata(directory: Path) -> tuple[Path, list[bytes], Read]:
    model = directory / "model"
    write_checkpoint(directory / "source", **TINY)
    write_distributed_state(directory / "source", model)
    shutil.copy(directory / "source/config.json", model)
    path = model / ".metadata"

    def read(number: int) -> None:
        header = read_checkpoint(model)
        checkpoint_figures(header)
        if number % THOROUGH == 0:
            _planned(model, number)
        make_plan(header, _GROW)

    return path, [path.read_bytes()], read


def _chunks(directory: Path) -> tuple[Path, list[bytes], Read]:
    model = directory / "model"
    state = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.zeros(3).bfloat16(),
        "optim": {"lr": 1e-3, "betas": (0.9, 0.95)},
    }
    dcp.save(state, checkpoint_id=model, no_dist=True)
    (path,) = model.glob("*.distcp")

    def read(_: int) -> None:
        stored = read_metadata(model)
        with DcpReader(stored) as reader:
            for key in stored.blobs:
                reader.blob(key)
            for key in stored.tensors:
                with contextlib.suppress(GdagrowError):
                    reader.tensor(key)
            reader.tensor("a")

    return path, [path.read_bytes()], read


def _values(directory: Path) -> tuple[Path, list[bytes], Read]:
    """What a state that several processes saved holds beside tensors, before an engine goes on from it."""
    model = directory / "model"
    write_checkpoint(directory / "source", **TINY)
    write_distributed_state(directory / "source", model)
    shutil.copy(directory / "source/config.json", model)
    (model / "trainer_state.json").write_text("{}")
    (path,) = model.glob("*.distcp")

    def read(number: int) -> None:
        read_state(model)
        if number % 10 == 0:
            prepare_growth(model, _GROW)

    return path, [path.read_bytes()], read


def _metrics(directory: Path) -> tuple[Path, list[bytes], Read]:
    run = directory / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    path = run / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0, "eval_loss": 2.25},
        {"step": 2, "event": "growth", "parameters": [1, 2]},
    ]

    def read(_: int) -> None:
        metrics_lines(path)
        last_state(run)
        read_run(run)

    return path, [b"\n".join(json.dumps(line).encode() for line in lines)], read


def _tokens(directory: Path) -> tuple[Path, list[bytes], Read]:
    (directory / "train.bin").write_bytes(bytes(2000))
    path = directory / "data.json"
    described = {
        "source": {},
        "train": [{"path": "train.bin", "dtype": "uint16", "offset": 0, "num_tokens": 1000}],
        "evaluation": [],
    }
    source = DataSource(train=("x",), held_out=0.1)

    def read(_: int) -> None:
        for windows in open_tokens(source, directory, 8, 256):
            _ = windows and windows[0]

    return path, [json.dumps(described).encode()], read


def _results(directory: Path) -> tuple[Path, list[bytes], Read]:
    path = directory / "results.json"
    write_results(growth_results(), path)
    return path, [path.read_bytes()], lambda _: void(read_results(path))


def void(_: object) -> None:
    """A result that nobody looks at."""


TARGETS: Final = {
    target.name: target
    for target in (
        Target("shard header", 25, mutation.of_shard, _of_model("model.safetensors")),
        Target("index", 15, mutation.of_json, _of_model("model.safetensors.index.json", index=True)),
        Target("config (Motif)", 15, mutation.of_json, _config),
        Target("config (DiffLlama)", 5, mutation.of_json, _diffllama),
        Target("growth.json", 9, mutation.of_json, _record),
        Target("recipe", 5, mutation.of_yaml, _recipe),
        Target("selection", 5, mutation.of_yaml, _selection),
        Target("like", 5, mutation.of_json, _like),
        Target("training recipe", 3, mutation.of_yaml, _training),
        Target("experiment", 1, mutation.of_yaml, _experiment),
        Target("trainer_state.json", 3, mutation.of_json, _trainer_state),
        Target("optimizer.pt", 2, mutation.of_torch_file, _optimizer),
        Target("scheduler.pt", 3, mutation.of_torch_file, _scheduler),
        Target(".metadata", 3, mutation.of_pickle, _metadata),
        Target(".distcp chunks", 4, mutation.of_bytes, _chunks),
        Target(".distcp values", 0.5, mutation.of_bytes, _values),
        Target("metrics.jsonl", 4, mutation.of_lines, _metrics),
        Target("tokens (data.json)", 2, mutation.of_json, _tokens),
        Target("results.json", 1, mutation.of_json, _results),
    )
}
