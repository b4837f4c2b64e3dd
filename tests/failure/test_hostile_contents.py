"""Files that claim what is absurd: sizes, depths, numbers, values that stand in themselves; one sentence, at once."""

import io
import json
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdagrow.checkpoint import read_checkpoint
from gdagrow.errors import CheckpointError, GdagrowError, PlanError, RecipeError
from gdagrow.formats.dcp_metadata import read_metadata
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.torch_file import read_torch_file
from gdagrow.heads import MAX_HEADS, Heads, grow_heads
from gdagrow.plain_yaml import read_yaml
from gdagrow.plan import make_plan
from gdagrow.recipe import make_recipe
from gdagrow.report.training import read_run
from gdagrow.states.optimizer_file import read_optimizer
from gdagrow.train.recipe import read_train_recipe
from tests.checkpoints import edit_json, write_checkpoint, write_training_state
from tests.command import call
from tests.trainings import CONFIG, recipe

TINY: dict[str, Any] = {"groups": 1, "ratio": 3, "head_dim": 2, "hidden": 4, "ffn": 4, "vocab": 5, "layers": 1}


@pytest.fixture(autouse=True)
def _takes_neither_long_nor_much(request: pytest.FixtureRequest) -> Any:
    """Two seconds of this processor, and 300 MiB more than before, are more than any of these takes."""
    before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - before < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 2**10


# YAML


def letters(count: int) -> str:
    return ", ".join(f"&{chr(at + 1)} [{', '.join([f'*{chr(at)}'] * 9)}]" for at in range(ord("a"), ord("a") + count))


REFUSED_YAML = {
    "deep lists": ("[" * 100_000, "not YAML: nested more than 100 levels deep"),
    "deep mappings": ("{a: " * 500, "not YAML: nested more than 100 levels deep"),
    "deep block": ("".join(f"{' ' * at}a:\n" for at in range(300)), "not YAML: nested more than 100 levels deep"),
    "billion laughs": (f"signal: [&a [x, x], {letters(12)}]", "not YAML: aliases (*name) say more than 10,000 values"),
    "a billion merges": (
        "a: &a {x: 1}\n" + "".join(f"{chr(at + 1)}: &{chr(at + 1)} {{<<: [{', '.join([f'*{chr(at)}'] * 9)}]}}\n"
                                   for at in range(ord("a"), ord("m"))),
        "not YAML: aliases (*name) say more than 10,000 values",
    ),
    "in itself": ("signal: &a [*a]", "not YAML: an alias (*name) stands inside what it names"),
    "in itself by a key": ("&a {x: {y: *a}}", "not YAML: an alias (*name) stands inside what it names"),
    "merged with itself": ("&a {<<: *a}", "not YAML: an alias (*name) stands inside what it names"),
    "code": ("signal: !!python/object/apply:os.system [exit]", "not YAML: could not determine a constructor"),
    "a date": ("signal: 2024-01-01", "expected numbers of at most 64 bits, texts, lists and mappings alone"),
    "a day that is none": ("signal: 2024-99-99", "not YAML: "),
    "bytes": ("signal: !!binary aGVsbG8=", "expected numbers of at most 64 bits, texts, lists and mappings alone"),
    "a set": ("signal: !!set {a, b}", "expected numbers of at most 64 bits, texts, lists and mappings alone"),
    "no number": ("signal: !!int x", "not YAML: "),
    "no float": ("signal: !!float x", "not YAML: "),
    "a key that is a list": ("{[a]: 1}", "expected numbers of at most 64 bits"),
    "an escape beyond Unicode": ('signal: "\\U00110000"', "not YAML: "),
    "a number that nobody can print": ("signal: 0x" + "f" * 5000, "expected numbers of at most 64 bits"),
    "a number with many digits": ("signal: " + "9" * 5000, "not YAML: "),
    "long": ("a: 1\n" + "# \n" * 2**17, "expected at most 262,144 bytes, got more"),
    "zeros": ("\0" * 100, "not YAML: "),
    "an old version": ("%YAML 1.1\n--- {signal: !!timestamp x}", "not YAML: "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_YAML)
def test_yaml(case: str, tmp_path: Path) -> None:
    text, sentence = REFUSED_YAML[case]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_yaml(tmp_path / "r.yaml", "recipe r.yaml")
    assert str(caught.value).startswith(f"recipe r.yaml: {sentence}")
    assert len(str(caught.value)) < 1000


def test_a_device_is_not_read_to_its_end() -> None:
    with pytest.raises(RecipeError, match="expected at most 262,144 bytes"):
        read_yaml(Path("/dev/zero"), "recipe /dev/zero")


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("\ufeffa: &a {x: 1, y: [2]}\nb: {<<: *a, y: 3}\nc: [*a, *a]\r\n", encoding="utf-8")
    assert read_yaml(tmp_path / "r.yaml", "r") == {
        "a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": [2]}, {"x": 1, "y": [2]}],
    }  # fmt: skip


# Sizes


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers: expected at most 10000, got 2147483647"),
        ({"num_attention_heads": 2**30, "num_noise_heads": 2}, f"num_attention_heads: expected at most {MAX_HEADS},"),
        ({"num_hidden_layers": 10_000}, "missing model.layers.1.self_attn.lambda_q1; "),
        ({"hidden_size": [[[[]]]]}, "hidden_size: expected a whole number of 1 or more, got [[[[]]]]"),
    ],
)  # fmt: skip
def test_sizes_that_nobody_has(keys: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **TINY)
    edit_json(tmp_path / "config.json", **keys)
    with pytest.raises(CheckpointError) as caught:
        make_plan(read_checkpoint(tmp_path), make_recipe({"signal": 2}))
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 21_000


def test_a_sentence_of_a_hundred_thousand_tensors_is_cut_before_what_to_do(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.x" for number in range(50_000)]
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at, name in enumerate(names)}
    text = json.dumps(header).encode()
    write_checkpoint(tmp_path, **TINY)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names)))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path)
    told = str(caught.value)
    assert 20_000 < len(told) < 20_100
    assert "'model.layers.0.x' is in a.safetensors, but the index says nothing of it; " in told
    assert told.endswith(
        "'model.layers.49999.x' is in a.safetensors, but the index says nothing of it; download the checkpoint again"
    )
    assert "characters are left out) ... " in told


def test_heads_that_nobody_has() -> None:
    with pytest.raises(PlanError, match=f"signal x512 with noise x1: 131328 query heads, expected at most {MAX_HEADS}"):
        grow_heads(Heads(256, 1, 1), signal=512, noise=1, kv=1)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_a_model_of_a_training_recipe_that_nobody_can_train(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(model={"config": {**CONFIG, key: 2**31}})))
    outcome = call(capsys, "train", tmp_path / "r.yaml", "--dry-run")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert key in outcome.err


def test_a_target_that_nobody_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_checkpoint(tmp_path / "model", **TINY)
    (tmp_path / "like.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31 - 1}))
    outcome = call(capsys, "plan", tmp_path / "model", "--like", tmp_path / "like.json")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "num_hidden_layers: expected at most 10000" in outcome.err


# JSON

REFUSED_JSON = {
    "101 levels": ('{"x": ' + "[" * 100 + "]" * 100 + "}", "nested too deep to be a checkpoint's"),
    "a thousand": ('{"x": ' + '{"y":' * 900 + "1" + "}" * 901, "nested too deep to be a checkpoint's"),
    "an endless number": ('{"x": ' + "9" * 400 + "}", "does not fit a float"),
    "a byte order mark": ("\ufeff{}", "not valid JSON (Unexpected UTF-8 BOM"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_JSON)
@pytest.mark.parametrize("file", ["config.json", "growth.json"])
def test_json(case: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, sentence = REFUSED_JSON[case]
    write_checkpoint(tmp_path, **TINY)
    (tmp_path / file).write_text(text)
    outcome = call(capsys, "inspect", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{file}: " in outcome.err
    assert sentence in outcome.err


@pytest.mark.parametrize("file", ["config.json", "growth.json"])
def test_a_file_that_is_too_large(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, **TINY)
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(2**40)
    outcome = call(capsys, "inspect", tmp_path)
    assert outcome.code == 2
    assert f"{file}: expected at most 100,000,000 bytes, got more" in outcome.err


RECORDS = {
    "history of numbers": {"history": [1]},
    "history that is none": {"history": {"a": 1}},
    "no lineage": {"history": [], "lineage": None, "noise": None},
    "noise beyond all numbers": {"noise": {"snr_db": 10**300 * 10, "seed": 1}},
    "factors that are none": {"factors": 3},
    "a recipe that is none": {"recipe": ["x"]},
    "a source that is none": {"source": None},
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_records(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **TINY)
    assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--signal-x2").code == 0
    edit_json(tmp_path / "grown/growth.json", **RECORDS[case])
    outcome = call(capsys, "inspect", tmp_path / "grown")
    assert outcome.code in (0, 2)
    assert outcome.code == 2 or case.startswith("noise")
    assert "a bug" not in outcome.err


# Runs


def test_figures_that_no_float_holds_are_left_out(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 10**400},
        {"step": 3, "loss": float("nan")},
        {"step": 4, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (curve,) = read_run(tmp_path).curves
    assert (curve.steps, curve.values) == ((1, 4), (2.0, 1.0))


# torch's files


def torch_zip(pickled: bytes, *, how: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", how) as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return written.getvalue()


def tuples(depth: int) -> bytes:
    """A tuple in a tuple in a tuple."""
    return b")" + b"\x85" * depth


def doubled(times: int) -> bytes:
    """`x = (x, x)`, again and again: a few bytes for two to that power of places."""
    return b"]" + b"".join(b"r" + struct.pack("<I", at) + b"j" + struct.pack("<I", at) + b"\x86" for at in range(times))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"


def tensor(sizes: bytes, strides: bytes) -> bytes:
    """One of the storage's own, of any size."""
    begin, end = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(", b"\x89ccollections\nOrderedDict\n)RtR."
    return begin + STORAGE + b"K\x00" + sizes + strides + end


HUGE = b"\x8a\x08" + struct.pack("<q", 2**60)
TORCH_FILES: dict[str, tuple[bytes, str]] = {
    "a key that ends a process": (torch_zip(b"\x80\x02}" + tuples(200_000) + b"K\x01s."), "is damaged or holds more"),
    "deep tuples": (torch_zip(b"\x80\x02" + tuples(200_000) + b"."), "is nested too deeply, or in itself"),
    "a few bytes that say billions": (torch_zip(b"\x80\x02" + doubled(60) + b"."), "holds more than 2,000,000 values"),
    "a list in itself": (torch_zip(b"\x80\x02]q\x00h\x00a."), "is nested too deeply, or in itself"),
    "bytes by the billion": (torch_zip(b"\x80\x02cbuiltins\nbytearray\n" + HUGE + b"\x85R."), "is damaged"),
    "a claim of 2^60 bytes": (torch_zip(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"."), "is damaged or holds more"),
    "2^60 numbers": (torch_zip(tensor(HUGE + b"\x85", b"K\x01\x85"), **{"data/0": bytes(4)}), "ends beyond the file"),
    "2^60 times one": (torch_zip(tensor(HUGE + b"\x85", b"K\x00\x85"), **{"data/0": bytes(4)}), "elements in order"),
    "a bomb": (torch_zip(b"]" + b"0]" * 10**6 + b".", how=zipfile.ZIP_DEFLATED), "is compressed, which torch never"),
    "no pickle": (torch_zip(b"").replace(b"data.pkl", b"data.pkx"), "expected one pickle of at most 100,000,000 bytes"),
    "two pickles": (torch_zip(b"}.", **{"x/data.pkl": b"}."}), "expected one pickle of at most 100,000,000 bytes"),
    "another end": (torch_zip(b"}.", byteorder=b"big"), "was written on a big-endian machine"),
    "an endless order": (torch_zip(b"}.", byteorder=b"little" * 10**6), "was written on a big-endian machine"),
    "no zip": (b"PK\x03\x04" * 100, "is not a file in torch's zip format"),
    "nothing": (b"", "is not a file in torch's zip format"),
    "a set": (torch_zip(b"\x80\x02cbuiltins\nset\n]\x85R."), "holds a set, expected tensors and plain values"),
}  # fmt: skip


def zip64(pickled: bytes) -> bytes:
    """A zip whose end says that all sizes stand in the other end, which claims 2^60 bytes."""
    raw = torch_zip(pickled)
    end = raw.rindex(b"PK\x05\x06")
    other = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, 2**60, 2**60)
    pointer = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    return raw[:end] + other + pointer + raw[end : end + 8] + b"\xff" * 12 + b"\0\0"


def claiming(pickled: bytes) -> bytes:
    """A record that claims 2^32 - 2 bytes, in a file of a few hundred."""
    raw = bytearray(torch_zip(pickled))
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 20 : entry + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    return bytes(raw)


TORCH_FILES |= {
    "2^60 bytes by zip64": (zip64(b"\x80\x02}."), "is not a file in torch's zip format"),
    "4 GB by a record": (claiming(b"\x80\x02}."), "expected one pickle of at most 100,000,000 bytes"),
}


@pytest.mark.parametrize("case", TORCH_FILES)
def test_torch_files(case: str, tmp_path: Path) -> None:
    content, sentence = TORCH_FILES[case]
    path = tmp_path / "optimizer.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


def change_optimizer(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(directory / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, directory / "optimizer.pt")


def test_a_learning_rate_of_a_million_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_training_state(tmp_path / "model", **TINY)
    change_optimizer(tmp_path / "model", lambda state: state["param_groups"][0].update(lr=torch.zeros(1000, 1000)))
    outcome = call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--signal-x2")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "tensor param_groups/0/lr has 1,000,000 elements, where a number or a few are expected" in outcome.err
    assert not (tmp_path / "grown").exists()


def test_numbers_of_parameters_are_numbers(tmp_path: Path) -> None:
    """As texts they would have the same paths as the numbers, and moments those of others."""
    write_training_state(tmp_path, **TINY)

    def one_as_text(state: dict[str, Any]) -> None:
        state["param_groups"][0]["params"][1] = "0"
        state["state"]["0"] = state["state"].pop(1)

    change_optimizer(tmp_path, one_as_text)
    with pytest.raises(CheckpointError, match="expected the state_dict of one torch optimizer"):
        read_optimizer(read_checkpoint(tmp_path))


@pytest.mark.parametrize("layout", ["sparse", "meta"])
def test_tensors_that_are_not_stored_plainly(layout: str, tmp_path: Path) -> None:
    made = torch.eye(3).to_sparse() if layout == "sparse" else torch.empty(3, device="meta")
    torch.save({"state": {0: {"exp_avg": made}}}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"expected one that is strided and stored, got|is damaged"):
        read_torch_file(tmp_path / "optimizer.pt")


def test_metadata_that_claims_what_is_not_there(tmp_path: Path) -> None:
    for content in (
        b"\x80\x04\x8d" + struct.pack("<Q", 2**60), b"\x80\x04\x8e" + struct.pack("<Q", 2**63), doubled(60) + b".",
        tuples(200_000) + b".", b"}" + tuples(200_000) + b"K\x01s.", b"]q\x00h\x00a.", pickle.dumps({}), b"", b".",
    ):  # fmt: skip
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(GdagrowError):
            read_metadata(tmp_path)


def test_a_recipe_that_names_a_file_which_cannot_be(tmp_path: Path) -> None:
    for name in ("x\0y", "x" * 5000, "/dev/null/x", str(tmp_path)):
        (tmp_path / "r.yaml").write_text(json.dumps(recipe(growth=[{"at": 2, "expand": name}])))
        with pytest.raises(RecipeError, match="cannot be read"):
            read_train_recipe(tmp_path / "r.yaml")
