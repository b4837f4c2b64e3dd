"""Every refusal through the command line: exit code 2, one sentence on stderr that says what to do, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import listing, write_checkpoint
from tests.command import call, run

FACTOR = "expected a whole number from 1 to 512, got"

# What is typed after `expand CKPT`, and what the sentence says.
REFUSED_GROWTHS = {
    "zero": ("--signal-x0", f"--signal-x: {FACTOR} 0"),
    "negative": ("--signal-x-1", f"--signal-x: {FACTOR} -1"),
    "fraction": ("--signal-x1.5", f"--signal-x: {FACTOR} '1.5'"),
    "word": ("--signal-xtwo", f"--signal-x: {FACTOR} 'two'"),
    "zero apart": ("--signal-x 0", f"--signal-x: {FACTOR} 0"),
    "negative apart": ("--noise-x -2", f"--noise-x: {FACTOR} -2"),
    "equals": ("--kv-x=0", f"--kv-x: {FACTOR} 0"),
    "hidden": ("--hidden-x0", f"--hidden-x: {FACTOR} 0"),
    "ffn": ("--ffn-xhalf", f"--ffn-x: {FACTOR} 'half'"),
    "uniform": ("--uniform-x0", f"--uniform-x: {FACTOR} 0"),
    "huge": ("--hidden-x1000000000000", f"--hidden-x: {FACTOR} '1000000000000'"),
    "several": ("--signal-x0 --ffn-x0", f"--signal-x: {FACTOR} 0; --ffn-x: {FACTOR} 0"),
    "nothing": ("", "growth: no growth asked for; give at least one factor above 1, such as --signal-x2"),
    "ones": ("--signal-x1 --kv-x1", "no growth asked for"),
    "head_dim": ("--head-dim-x2", "head_dim cannot grow: the softmax scale and the RoPE frequencies depend on it"),
    "head_dim apart": ("--head-dim-x 2", "head_dim cannot grow: the softmax scale"),
    "ratio and factor": ("--ratio 4:1 --signal-x2", "--ratio and --signal-x both say"),
    "ratio that shrinks": ("--ratio 2:1", "signal 2:1: the ratio would shrink from 3:1"),
    "ratio as it is": ("--ratio 3:1", "nothing would grow: the source already has the ratio 3:1"),
    "ratio without one": ("--ratio 4", "--ratio: expected a target ratio R:1 with a whole R of 1 or more, such as 4:1"),
    "ratio of two": ("--ratio 4:2", "--ratio: expected a target ratio R:1"),
    "heads that do not divide": ("--noise-x2", "signal x1 with noise x2: 6 signal heads do not divide into 4 groups"),
    "KV groups that do not divide": ("--kv-x3", "kv x3: 3 KV groups do not divide 2 query groups"),
    "uniform and more": ("--uniform-x2 --kv-x2", "uniform grows all five axes and stands alone; remove kv or uniform"),
    "untie what is not tied": ("--untie --signal-x2", "the source's head and embedding are not tied"),
    "noise too loud": ("--signal-x2 --snr-db 3", "--snr-db: input should be greater than or equal to 20, got '3'"),
    "seed": ("--signal-x2 --seed one", "--seed: input should be a valid integer"),
    "shard size": ("--signal-x2 --max-shard-size big", "max-shard-size: expected a size such as 5GB"),
    "no recipe": ("--recipe nowhere.yaml", "recipe nowhere.yaml: cannot be read: No such file or directory"),
    "option unknown": ("--signals 2", "no such option: --signals"),
    "option without value": ("--signal-x", "option '--signal-x' requires an argument"),
}  # fmt: skip


def require_refusal(capsys: pytest.CaptureFixture[str], root: Path, sentence: str, *words: object) -> None:
    """Run a command that must say one sentence and leave everything under `root` as it is."""
    before = listing(root)
    outcome = call(capsys, *words)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    assert sentence in outcome.err
    assert listing(root) == before


@pytest.mark.parametrize("case", REFUSED_GROWTHS)
def test_a_growth_that_cannot_be(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    flags, sentence = REFUSED_GROWTHS[case]
    require_refusal(capsys, tmp_path, sentence, "expand", tmp_path / "model", *flags.split())


def test_a_recipe_that_is_none_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "r.yaml").write_text("signal: 0\nwidth: 2\n")
    words = "expand", tmp_path / "model", "--recipe", tmp_path / "r.yaml", "--kv-x0"
    sentence = f"error: --kv-x: {FACTOR} 0; recipe {tmp_path}/r.yaml: signal: {FACTOR} 0; unknown key 'width'"
    require_refusal(capsys, tmp_path, sentence, *words)


def edit_config(directory: Path, **keys: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **keys}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_header(directory: Path) -> None:
    """Let the last tensor end behind the end of the file, its shape with it."""
    raw = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    last = max((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][1])
    last["data_offsets"][1] += 2 * last["shape"][-1] if len(last["shape"]) > 1 else 2
    last["shape"][0] += 1
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def edit_index(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weight_map = dict.fromkeys(load_file(weights), "../outside.safetensors")
    weights.rename(directory.parent / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(directory: Path) -> None:
    raw = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(raw[:-10])


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"

# How the checkpoint is broken, and what the sentence says.
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no file config.json"),
    "unreadable JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "truncated shard": (truncate, "is truncated: expected"),
    "header pointing outside": (edit_header, "lies outside the file"),
    "index outside": (edit_index, "expected plain file names in weight_map, got '../outside.safetensors'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "missing tensor": (lambda d: edit_weights(d, lambda t: t.pop(Q_PROJ)), f"missing {Q_PROJ}"),
    "extra tensor": (lambda d: edit_weights(d, lambda t: t.update(x=torch.zeros(2))), "unknown x"),
    "misshapen tensor": (lambda d: edit_weights(d, lambda t: t.update({Q_PROJ: torch.zeros(3, 32)})),
                         f"{Q_PROJ} has shape [3, 32], expected [64, 32]"),
    "k_ratio": (lambda d: edit_config(d, k_ratio=2), "k_ratio: expected 1, as in every published model, got 2"),
    "no table": (lambda d: edit_config(d, model_type="llama"), "model_type 'llama' has no table; gdagrow knows motif"),
    "heads": (lambda d: edit_config(d, num_noise_heads=3), "num_attention_heads 8 and num_noise_heads 3"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["expand", "plan"])
@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_read(
    case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model")
    spoil, sentence = BROKEN_CHECKPOINTS[case]
    spoil(tmp_path / "model")
    require_refusal(capsys, tmp_path, sentence, command, tmp_path / "model", "--signal-x2")
    require_refusal(capsys, tmp_path, sentence, "inspect", tmp_path / "model")


@pytest.mark.parametrize("command", ["inspect", "plan --signal-x2", "expand --signal-x2"])
def test_not_a_directory(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        require_refusal(capsys, tmp_path, f"{path} is not a directory", *command.split(), path)


def test_a_target_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    for target in ("model-signal-x2", "other"):
        (tmp_path / target).mkdir()
        (tmp_path / target / "mine.txt").write_text("kept")
    sentence = "exists and is not empty; remove it or choose another output"
    require_refusal(capsys, tmp_path, sentence, "expand", tmp_path / "model", "--signal-x2")
    require_refusal(capsys, tmp_path, sentence, "expand", tmp_path / "model", tmp_path / "other", "--kv-x2")
    (tmp_path / "file").write_text("")
    words = "expand", tmp_path / "model", tmp_path / "file", "--signal-x2"
    require_refusal(capsys, tmp_path, "exists and is not a directory", *words)


def test_a_target_in_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    words = "expand", tmp_path / "model", tmp_path / "model" / "grown", "--signal-x2"
    require_refusal(capsys, tmp_path, "lies in the source", *words)


def test_no_space(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    words = "expand", tmp_path / "model", "--signal-x2"
    require_refusal(capsys, tmp_path, "bytes needed, 1,000 bytes free; free some or choose another disk", *words)


def test_an_own_record_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    for content in ("[]", "{}", '{"history": []}', '{"history": [3], "noise": {"seed": "x"}}'):
        (tmp_path / "model" / "growth.json").write_text(content)
        require_refusal(capsys, tmp_path, "growth.json: expected ", "inspect", tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("diff {0} {1} --seed 1 --text notes.txt", "--seed is of random tokens and --text brings its own"),
        ("diff {0} {1} --text nowhere.txt", "nowhere.txt cannot be read"),
        ("diff {0} {1} --dtype int8", "invalid value for '--dtype'"),
        ("diff {0} {1} --length 0", "invalid value for '--length'"),
        ("diff {0} {1} --device abacus", "--device abacus: cannot be used here"),
        ("diff {0} {2}", "vocabulary"),
        ("diff {0} {2} --weights", "have vocabulary 61 and 62, which growth never changes"),
        (
            "diff {0} {1} --weights --seqs 4 --device cpu",
            "--weights runs no model, so --seqs, --device would do nothing",
        ),
        ("diff {0} {2}", "neither logits nor weights can be compared"),
        ("diff {0} {2} --gradients", "vocabulary"),
        ("diff {0} {1} --weights --decode 2", "--weights runs no model, so --decode would do nothing"),
        ("diff {0} {1} --gradients --decode 2", "--gradients decodes nothing, so --decode would do nothing"),
        ("diff {0} {1} --weights --gradients", "--weights and --gradients: one kind of evidence at a time"),
        ("diff {0} {1} --gradients --length 1", "expected sequences of at least 2 tokens, got 1"),
        ("diff {0} {3}", "is not a directory"),
        ("diff {0}", "missing argument 'GROWN'"),
        ("stats {0} --seed 1 --text notes.txt", "--seed is of random tokens and --text brings its own"),
        ("stats {0} --text nowhere.txt", "nowhere.txt cannot be read"),
        ("stats {0} --device abacus", "--device abacus: cannot be used here"),
        ("stats {0} --layer 2", "a has the layers 0 to 1; choose one of them"),
        ("stats {0} --layer 1 --json", "--json has every head of every layer already"),
        ("stats {0} --lineage {3}", "nowhere: no such file; give a growth.json or a directory that has one"),
        ("stats {0} --lineage {1}", "b/growth.json: no such file"),
        ("stats {0} --lineage {0}/config.json", "config.json: expected the record of an earlier growth"),
        ("stats {3}", "is not a directory"),
        ("grow {0}", "no such command 'grow'"),
        ("inspect {0} {1}", "unexpected extra argument"),
    ],
)
def test_what_cannot_be_compared_or_understood(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c, nowhere = (tmp_path / name for name in ("a", "b", "c", "nowhere"))
    for directory in (a, b):
        write_checkpoint(directory)
    write_checkpoint(c, vocab=62)
    require_refusal(capsys, tmp_path, sentence, *words.format(a, b, c, nowhere).split())


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Standard error alone speaks, with --json too, and --debug adds the traceback wherever it stands."""
    for flags in (["--signal-x0"], ["--signal-x0", "--json"], ["--noise-x2", "--json", "--quiet"]):
        write_checkpoint(tmp_path / "model")
        before = listing(tmp_path)
        outcome = run("expand", tmp_path / "model", *flags)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert listing(tmp_path) == before
    after, global_ = (
        run("plan", tmp_path / "model", "--noise-x2", "--debug"),
        run("--debug", "plan", tmp_path, "--kv-x2"),
    )
    for outcome in (after, global_):
        assert outcome.code == 2
        assert "Traceback (most recent call last)" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("error: ")
