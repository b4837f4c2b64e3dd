"""A torch distributed checkpoint as gdagrow sees a checkpoint: weights by the names of an architecture's table.

`read_dcp` gives a `DcpHeader`, which `make_plan` takes as it takes any header: its tensors are the weights. The
moments stand beside them by parameter and kind, and what else was saved is carried. `gdagrow.dcp_tensors` reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gdagrow.archs import Architecture, architecture_of
from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_metadata import DcpMetadata, StoredTensor, read_metadata
from gdagrow.formats.dcp_names import DcpNames, name_keys, renamed_path
from gdagrow.formats.links import require_inside
from gdagrow.formats.small_file import read_small_file
from gdagrow.formats.strict_json import parse_object
from gdagrow.header import Header, TensorInfo

CONFIG: Final = "config.json"


@dataclass(frozen=True, kw_only=True)
class DcpHeader(Header):
    """A DCP directory without its values.

    Of the `TensorInfo` of its tensors only the name, the dtype, the shape and the number of bytes have a meaning:
    their bytes may lie in many files.

    dcp: What is stored, by key.
    names: Which key is which weight, and which moment of which weight.
    moments: (parameter name, moment's name) to the moment, whose name is its key; `step` is one of them.
    tied_head: The key of a tied head, where the embedding was saved under the head's name as well (as
        `model.state_dict()` does); `tensors` has it once.
    place: Where in the checkpoint's `directory` the DCP directory is; empty if it is that itself.
    """

    dcp: DcpMetadata
    names: DcpNames
    moments: Mapping[tuple[str, str], TensorInfo]
    tied_head: str | None
    place: str = ""

    def inside(self, file: str) -> str:
        """The path in the checkpoint's directory of a file of the DCP directory."""
        return f"{self.place}/{file}" if self.place else file

    @property
    def shards(self) -> tuple[str, ...]:
        """The files that hold values, sorted by name; `.metadata` is not one."""
        return tuple(self.shard_bytes)

    @property
    def shard_bytes(self) -> Mapping[str, int]:
        """Bytes of each of these files, by name."""
        return {self.inside(file): stat.num_bytes for file, stat in sorted(self.dcp.files.items())}

    def path(self, key: str, like: str, name: str, parameter: str) -> tuple[str | int, ...]:
        """The path in the nested state dict of a key that may be new.

        Args:
            key: It, of parameter `parameter`.
            like: A key of the directory that is the same for parameter `name`.
        """
        stored = self.dcp.paths.get(like)
        return (key,) if stored is None else renamed_path(stored, name, parameter)


def read_dcp(directory: Path, config: Path | None = None, place: str = "") -> DcpHeader:
    """Read a DCP directory's metadata and its model's config; no value is read.

    Args:
        directory: The checkpoint.
        config: The model's `config.json`, or a directory that has it; that in `directory` if None.
        place: The directory in it that holds `.metadata`, if it is not that itself.

    Raises:
        CheckpointError: the metadata is damaged or unsafe (see `read_metadata`), there is no config, or a tensor is
            no weight or moment of the model that the config describes (all of them are named).
    """
    stored = read_metadata(directory / place)
    return _described(directory, read_config(directory, config), stored, place)


def read_beside(header: DcpHeader, place: str) -> DcpHeader:
    """Read another DCP directory of the same checkpoint and model, as `read_dcp` does."""
    return _described(header.directory, header.config, read_metadata(header.directory / place), place)


def _described(directory: Path, config: Mapping[str, Any], stored: DcpMetadata, place: str) -> DcpHeader:
    architecture = architecture_of(config)
    names = name_keys(stored, _parameters(architecture, config))
    tensors = {name: _info(stored.tensors[key], name) for name, key in names.weights.items()}
    head = None
    if architecture.is_tied(config) and architecture.head in tensors:
        head = names.weights[architecture.head]
        _require_same_form(stored, head, names.weights.get(architecture.embedding))
        del tensors[architecture.head]
    moments = {place: _info(stored.tensors[key], key) for place, key in names.moments.items()}
    return DcpHeader(
        directory, config, tensors, {}, dcp=stored, names=names, moments=moments, tied_head=head, place=place
    )


def read_config(directory: Path, config: Path | None) -> dict[str, Any]:
    """Read the model's config of a DCP directory, from it or from where the user says that it is.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    path = config_file(directory, config)
    return parse_object(read_small_file(path), str(path))


def config_file(directory: Path, config: Path | None) -> Path:
    """Where the model's config of a DCP directory is; raises CheckpointError if it is nowhere."""
    if config is None:
        path = require_inside(directory, directory / CONFIG)
        if not path.is_file():
            raise CheckpointError(f"{directory} has no {CONFIG}; give the model's with --config PATH")
        return path
    path = config / CONFIG if config.is_dir() else config
    if not path.is_file():
        raise CheckpointError(f"{config} is neither a {CONFIG} nor a directory that has one; check --config")
    return path


def _parameters(architecture: Architecture, config: Mapping[str, Any]) -> set[str]:
    """The names of all parameters that a model may have, a tied head's included."""
    num_layers = architecture.sizes(config).num_layers
    return {architecture.head} | {
        parameter.name.format(layer=layer)
        for parameter in architecture.table(config)
        for layer in range(num_layers if parameter.is_layered else 1)
    }


def _info(tensor: StoredTensor, name: str) -> TensorInfo:
    file = tensor.chunks[0].blob.file if tensor.chunks else ""
    return TensorInfo(name, tensor.dtype, tensor.shape, file, 0, tensor.num_bytes)


def _require_same_form(stored: DcpMetadata, head: str, embedding: str | None) -> None:
    if embedding is None:
        return
    ours, theirs = stored.tensors[embedding], stored.tensors[head]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        raise CheckpointError(
            f"{stored.directory}: config.json ties the head to the embedding, but {head!r} is {theirs.dtype} "
            f"{list(theirs.shape)} and {embedding!r} is {ours.dtype} {list(ours.shape)}; give the config.json that "
            "belongs to it"
        )
