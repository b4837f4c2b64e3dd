"""The config of the model that a run trains, and what it says before there is a weight."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gdagrow.archs import Parameter, trained_of
from gdagrow.costs import checkpoint_figures
from gdagrow.errors import TrainError
from gdagrow.formats.kind import SHARDED_WEIGHTS
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.small_file import read_small_file
from gdagrow.formats.strict_json import parse_object
from gdagrow.header import ITEM_BYTES, Header, TensorInfo
from gdagrow.train.recipe import ModelSource

# Weights and moments are kept so, whatever a step is computed in.
KEPT_DTYPE: Final = "F32"
# What a config says if it does not say so itself; transformers would end a Llama's text at some byte.
_LEFT_OUT: Final = {"llama": {"hidden_act": "silu", "bos_token_id": None, "eos_token_id": None}}


def is_sharded(state: Path) -> bool:
    """Whether several processes saved a state, each its own part."""
    return (state / SHARDED_WEIGHTS).is_dir()


def header_of(source: ModelSource) -> Header:
    """The model that a run starts from, every tensor in the dtype that it is trained in.

    Raises:
        CheckpointError: the directory is no checkpoint, or the config makes no sense or has no table.
        TrainError: the checkpoint is in parts of several processes.
    """
    if source.config is not None:
        config = {"model_type": "motif", **source.config}
        return header_of_config({**_LEFT_OUT.get(str(config["model_type"]), {}), **config})
    assert source.directory is not None
    if is_sharded(source.directory):
        raise TrainError(
            f"{source.directory} holds the weights of several processes, each its part; make a model directory of it "
            "first with gdagrow convert"
        )
    header = read_header(source.directory)
    checkpoint_figures(header)  # refuses tensors that are missing or misshapen
    return _kept(header.directory, header.config, {name: info.shape for name, info in header.tensors.items()})


def header_of_config(config: Mapping[str, Any]) -> Header:
    """A model of these sizes, as if it were stored; biases as `use_bias` says.

    Raises:
        CheckpointError: the config makes no sense or has no table.
    """
    architecture = trained_of(config)
    sizes = architecture.sizes(config)
    rows = [row for row in architecture.table(config) if not row.optional or config.get("use_bias")]
    shapes = {name: row.parsed.shape(sizes.axes) for name, row in _named(rows, sizes.num_layers)}
    return _kept(Path(), config, shapes)


def config_in(state: Path) -> dict[str, Any]:
    """The `config.json` of a state of a run."""
    path = state / "config.json"
    return parse_object(read_small_file(path), str(path))


def _named(rows: list[Parameter], num_layers: int) -> Iterator[tuple[str, Parameter]]:
    for row in rows:
        yield from ((row.name.format(layer=layer), row) for layer in range(num_layers if row.is_layered else 1))


def _kept(directory: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Header:
    tensors, start = {}, 0
    for name, shape in shapes.items():
        info = TensorInfo(name, KEPT_DTYPE, shape, "", start, start)
        tensors[name] = replace(info, stop=start + info.num_elements * ITEM_BYTES[KEPT_DTYPE])
        start = tensors[name].stop
    return Header(directory, config, tensors, {})
