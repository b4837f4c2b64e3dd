import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from gdagrow.dcp import read_dcp
from gdagrow.dcp_tensors import DcpTensors, require_tied
from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_metadata import read_metadata
from gdagrow.formats.dcp_reader import DcpReader
from gdagrow.models.gda import load_model
from gdagrow.plan import make_plan
from gdagrow.recipe import Recipe
from tests.checkpoints import write_checkpoint
from tests.dcp_ranks import run_jobs

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("torch.distributed is disabled", "Detected an")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch saved: of a training state by one rank and by three, and tensors that four ranks shared in a grid."""
    root = tmp_path_factory.mktemp("dcp")
    write_checkpoint(root / "source")
    run_jobs(
        ("save", 1, root / "source", root / "one", root / "one.safetensors"),
        ("save", 3, root / "source", root / "three", root / "three.safetensors"),
        ("save_grids", 4, root / "grids", root / "grids.safetensors"),
    )
    return root


@pytest.mark.parametrize("name", ["one", "three", "grids"])
def test_what_torch_saved_is_read_bit_for_bit_whole_and_by_rows(saved: Path, name: str) -> None:
    expected = load_file(saved / f"{name}.safetensors")
    stored = read_metadata(saved / name)
    assert set(expected) == set(stored.tensors)
    with DcpReader(stored) as reader:
        for key, tensor in expected.items():
            assert reader.tensor(key).dtype == tensor.dtype
            assert torch.equal(reader.tensor(key), tensor), key
            assert reader.tensor(key).data_ptr() % tensor.itemsize == 0
            for begin in range(len(tensor) if tensor.shape else 0):
                for end in (begin, begin + 1, len(tensor)):
                    assert torch.equal(reader.rows(key, begin, end), tensor[begin:end]), (key, begin, end)


def test_a_sharded_training_state_is_a_header_with_moments(saved: Path) -> None:
    expected = load_file(saved / "three.safetensors")
    header = read_dcp(saved / "three", saved / "source")
    plan = make_plan(header, Recipe(signal=2))
    assert plan.after.heads.ratio == 6
    assert header.names.prefix == "model."
    kinds = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert header.names.moment_prefixes == dict.fromkeys(kinds, "optim.state.")
    assert set(header.moments) == {(name, kind) for name in header.tensors for kind in kinds}
    assert header.shards == ("__0_0.distcp", "__1_0.distcp", "__2_0.distcp")
    assert "optim.param_groups.0.lr" in header.dcp.blobs
    assert header.names.moment_key("lm_head.weight", "exp_avg") == "optim.state.lm_head.weight.exp_avg"
    with DcpTensors(header) as weights, ThreadPoolExecutor(4) as threads:
        read = dict(zip(header.tensors, threads.map(weights.tensor, header.tensors), strict=True))
    assert read.keys() == {name.removeprefix("model.") for name in expected if name.startswith("model.")}
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in read.items())


def test_values_that_are_no_tensors_are_carried_as_they_are_stored(saved: Path) -> None:
    header = read_dcp(saved / "three", saved / "source")
    with DcpTensors(header) as reader:
        path = saved / "rate.pt"
        path.write_bytes(reader.blob("optim.param_groups.0.lr"))
    assert torch.load(path, weights_only=True) == 1e-2
    assert header.dcp.paths["optim.param_groups.0.lr"] == ("optim", "param_groups", 0, "lr")


def test_a_file_that_is_cut_off_while_it_is_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save({"w": torch.zeros(5000, 3)}, checkpoint_id=tmp_path, no_dist=True)
    with DcpReader(read_metadata(tmp_path)) as reader:
        reader.rows("w", 0, 1)  # finds where it lies
        read = os.preadv

        def cut(file: int, buffers: list[memoryview], start: int) -> int:
            monkeypatch.undo()
            os.truncate(next(tmp_path.glob("*.distcp")), start + 5000)
            return read(file, buffers, start)

        monkeypatch.setattr(os, "preadv", cut)
        with pytest.raises(CheckpointError, match=r"\.distcp changed since its directory was read"):
            reader.rows("w", 0, 5000)


def test_tensors_are_read_however_they_lay_in_memory(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(10, 6)
    state = {"turned": base.t(), "part": base[2:5, 1:4], "flat": base[3], "scalar": torch.tensor(2.5),
             "none": torch.empty(0, 4), "same": torch.ones(1).expand(5), "count": torch.tensor([1, 2]),
             "steps": torch.arange(8)[::2], "nested": {"list": [torch.zeros(2), torch.ones(2)]}}  # fmt: skip
    for options in ({}, {"single_file_per_rank": False}, {"thread_count": 3}):
        directory = tmp_path / f"d{len(list(tmp_path.iterdir()))}"
        dcp.save(state, storage_writer=FileSystemWriter(directory, **options), no_dist=True)
        with DcpReader(read_metadata(directory)) as reader:
            for key, tensor in state.items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(reader.tensor(key), tensor), key
            assert torch.equal(reader.rows("turned", 1, 4), base.t()[1:4])
            assert torch.equal(reader.tensor("nested.list.1"), torch.ones(2))


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4)}, checkpoint_id=tmp_path, no_dist=True)
    with DcpReader(read_metadata(tmp_path)) as reader:
        with (tmp_path / "__0_0.distcp").open("ab") as file:
            file.write(b"x")
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp changed since its directory was read"):
            reader.tensor("w")


PREFIXES = ["", "model.", "_orig_mod.", "module.", "model._orig_mod.module.", "app.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_weights_and_moments(tmp_path: Path, prefix: str) -> None:
    write_checkpoint(tmp_path / "source", layers=1)
    weights = load_file(tmp_path / "source" / "model.safetensors")
    state = {prefix + name: tensor for name, tensor in weights.items()}
    state |= {f"optimizer.state.{name}.momentum_buffer": tensor.float() for name, tensor in weights.items()}
    state |= {"optimizer.param_groups.0.lr": torch.tensor(0.1), "rng": torch.get_rng_state()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    shutil.copy(tmp_path / "source" / "config.json", tmp_path / "dcp")
    header = read_dcp(tmp_path / "dcp")
    assert header.names.weights == {name: prefix + name for name in weights}
    assert header.names.moments == {
        (name, "momentum_buffer"): f"optimizer.state.{name}.momentum_buffer" for name in weights
    }
    assert header.names.carried == ("optimizer.param_groups.0.lr", "rng")
    assert make_plan(header, Recipe(uniform=2)).num_bytes > 2 * header.num_bytes


def write_dcp(directory: Path, **sizes: object) -> dict[str, torch.Tensor]:
    """A small DCP directory with its config, weights under `model.`; returns the state that is in it."""
    write_checkpoint(directory, layers=1, **sizes)  # type: ignore[arg-type]
    state = {f"model.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    dcp.save(state, checkpoint_id=directory, no_dist=True)
    return state


def test_a_tied_head_that_was_saved_twice_is_one_weight(tmp_path: Path) -> None:
    state = write_dcp(tmp_path, tied=True)
    embedding = state["model.model.embed_tokens.weight"]
    for head, refused in ((embedding, False), (embedding * 2, True)):
        dcp.save({**state, "model.lm_head.weight": head}, checkpoint_id=tmp_path, no_dist=True)
        header = read_dcp(tmp_path)
        assert header.tied_head == "model.lm_head.weight"
        assert "lm_head.weight" not in header.tensors
        assert make_plan(header, Recipe(signal=2)).tied_after
        with DcpTensors(header) as reader:
            if not refused:
                require_tied(header, reader, chunk_bytes=100)
                continue
            with pytest.raises(CheckpointError, match=r"'model\.lm_head\.weight' and .* differ in rows 0 to 0; set"):
                require_tied(header, reader, chunk_bytes=100)


def test_tensors_that_belong_to_nothing_are_refused_all_by_name(tmp_path: Path) -> None:
    state = write_dcp(tmp_path)
    extra = {"model.layers.0.extra": torch.ones(2), "ema.shadow": torch.ones(3, 3)}
    dcp.save({**state, **extra}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match=r"2 tensors belong to no parameter .*: model\.layers\.0\.extra; ema\.sh"):
        read_dcp(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    state = write_dcp(tmp_path)
    dcp.save(
        {**state, "ema.model.norm.weight": torch.ones(32), "ema.lm_head.weight": torch.ones(2)},
        checkpoint_id=tmp_path, no_dist=True,
    )  # fmt: skip
    with pytest.raises(
        CheckpointError,
        match=r"expected the prefix 'model\.' before all weights.*leave out: ema\.model\.norm\.weight; ema\.lm_head\.w",
    ):
        read_dcp(tmp_path)


def test_names_of_another_model_are_refused_all_of_them(tmp_path: Path) -> None:
    write_dcp(tmp_path)
    dcp.save(
        {"tok_embeddings.weight": torch.ones(61, 32), "norm.weight": torch.ones(32)},
        checkpoint_id=tmp_path, no_dist=True,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"none of its 2 tensors .*: tok_embeddings\.weight; norm\.weight"):
        read_dcp(tmp_path)


def test_the_config_may_lie_elsewhere_and_must_lie_somewhere(tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp")
    config = tmp_path / "dcp" / "config.json"
    shutil.move(config, tmp_path / "motif.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the model's with --config PATH"):
        read_dcp(tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"is neither a config\.json nor a directory that has one"):
        read_dcp(tmp_path / "dcp", tmp_path)
    header = read_dcp(tmp_path / "dcp", tmp_path / "motif.json")
    assert header.config == json.loads((tmp_path / "motif.json").read_text())


def test_a_tree_as_torchtitan_saves_it(tmp_path: Path) -> None:
    """Weights at the top, an optimizer's state flattened by name, and what else its trainer keeps."""
    write_checkpoint(tmp_path / "dcp", layers=1)
    model = load_model(tmp_path / "dcp", dtype=torch.float32)
    (tmp_path / "dcp" / "model.safetensors").unlink()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(20).reshape(2, 10)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {
        **get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "lr_scheduler": {"last_epoch": 3}, "dataloader": {"dp_rank_0": b"position"},
        "train_state": {"step": torch.tensor(3, dtype=torch.int32), "log_steps": io.BytesIO(b"steps")},
    }  # fmt: skip
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    header = read_dcp(tmp_path / "dcp")
    weights = dict(model.named_parameters())
    assert (header.names.prefix, header.names.carried) == ("", ("train_state.step",))
    assert header.names.moment_prefixes == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "optimizer.state.")
    assert "optimizer.param_groups.model.norm.weight.lr" in header.dcp.blobs
    with DcpTensors(header) as reader:
        for name, weight in weights.items():
            assert torch.equal(reader.tensor(name), weight)
            moment = reader.tensor(header.moments[name, "exp_avg_sq"].name)
            assert torch.equal(moment, optimizer.state[weight]["exp_avg_sq"])
        assert reader.tensor("train_state.step") == 3
