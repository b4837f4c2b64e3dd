"""Put a checkpoint's weights into another format, as a stream and bit for bit: safetensors and DCP, both ways."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.dcp import CONFIG, DcpHeader, config_file, read_dcp, require_tied
from gdagrow.errors import CheckpointError, OutputError
from gdagrow.formats.dcp_layout import plan_dcp
from gdagrow.formats.dcp_metadata import METADATA_FILE, is_dcp
from gdagrow.formats.dcp_reader import DcpReader
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.publish import check_free_space, copy_companions, list_companions, staged
from gdagrow.formats.safetensors_header import INDEX_FILE, SINGLE_FILE, read_header
from gdagrow.formats.safetensors_layout import index_json, plan_shards
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.header import ITEM_BYTES, Header
from gdagrow.rows import claim

# The tree that a trainer saves with `{"model": model.state_dict()}`.
TREE: Final = "model"
RECORD: Final = "growth.json"
_CHUNK_BYTES: Final = 8 * 2**20
_SPARE_BYTES: Final = 2**20  # for the index and the like

Progress = Callable[[int], None]


class Format(StrEnum):
    """How weights are stored."""

    dcp = "dcp"
    safetensors = "safetensors"


@dataclass(frozen=True)
class Conversion:
    """What was written.

    files: Name to number of bytes of the files that hold weights.
    num_bytes: Bytes of weights.
    copied: Files that came along, by path.
    left_behind: What of the source was not, with the reason.
    """

    target: Path
    files: Mapping[str, int]
    num_bytes: int
    copied: tuple[str, ...]
    left_behind: tuple[str, ...]


class _Reader(Protocol):
    def rows(self, key: str, begin: int, end: int, /) -> Tensor: ...


@dataclass(frozen=True)
class _Source:
    """A checkpoint to convert: what to call its tensors, and where its config and companions are.

    keys: Weight by parameter name to what the reader calls it.
    """

    header: Header
    keys: Mapping[str, str]
    reader: AbstractContextManager[_Reader]
    config: Path
    left_behind: tuple[str, ...] = ()


def convert_format(
    source: Path, target: Path, to: Format, *, config: Path | None = None, max_file_bytes: int,
    progress: Progress | None = None,
) -> Conversion:  # fmt: skip
    """Write the weights of `source` in another format into `target`, which appears whole or not at all.

    Args:
        source: A directory of safetensors weights or a DCP directory.
        target: The directory to make; it may exist if it is empty.
        to: The format to write.
        config: The `config.json` of a DCP directory that has none, or a directory that has it; from such a directory
            the companion files (tokenizer and so on) come too.
        max_file_bytes: The largest weight file, unless a single tensor is larger.
        progress: Called with the number of bytes written since its last call.

    Raises:
        CheckpointError: the source cannot be read, has the format already, or is no model that gdagrow knows.
        OutputError: the target exists, there is no room, or the disk refuses.
    """
    found = _open(source, config, to)
    place = Path(os.path.abspath(target))
    _require_apart(source, place)
    targets = [TargetTensor(name, found.header.tensors[name].dtype, found.header.tensors[name].shape)
               for name in found.keys]  # fmt: skip
    layouts, texts, keys = (_dcp if to == Format.dcp else _safetensors)(found, targets, max_file_bytes)
    beside = found.config.parent if config is None or config.is_dir() else source
    companions = list_companions(beside)
    with staged(place) as partial, found.reader as reader:
        num_bytes = sum((beside / name).stat().st_size for name in companions.copied)
        check_free_space(place.parent, num_bytes + sum(layout.file_bytes for layout in layouts) + _SPARE_BYTES)
        copy_companions(beside, partial)
        records = [CONFIG] + [RECORD] * (beside / RECORD).is_file()
        for path in (found.config, *(beside / name for name in records[1:])):
            _copy(path, partial / (CONFIG if path == found.config else path.name))
        for layout in layouts:
            _write_tensors(reader, layout, keys, partial, progress)
        for name, content in texts.items():
            _write(partial / name, content)
    skipped = tuple(f"{skip.path}: {skip.reason}" for skip in companions.skipped if skip.path not in (CONFIG, RECORD)
                    and skip.path not in found.header.shards and skip.path not in (INDEX_FILE, METADATA_FILE))  # fmt: skip
    return Conversion(
        target, {layout.file: layout.file_bytes for layout in layouts}, sum(layout.data_bytes for layout in layouts),
        tuple(sorted((*companions.copied, *records))), found.left_behind + skipped,
    )  # fmt: skip


def format_of(directory: Path) -> Format:
    """How a checkpoint stores its weights; what is neither is for the reader of safetensors to refuse.

    Raises:
        CheckpointError: it has weights in both formats.
    """
    if not is_dcp(directory):
        return Format.safetensors
    if others := [name for name in (SINGLE_FILE, INDEX_FILE) if os.path.lexists(directory / name)]:
        raise CheckpointError(
            f"{directory} has both {METADATA_FILE} and {others[0]}, so it is ambiguous which holds the model; "
            "remove the one that is stale"
        )
    return Format.dcp


def _open(source: Path, config: Path | None, to: Format) -> _Source:
    stored = format_of(source)
    if stored == to:
        raise CheckpointError(f"{source} stores its weights as {to} already; there is nothing to convert")
    if stored == Format.dcp:
        header = read_dcp(source, config)
        names = _claimed(header)
        reader = DcpReader(header.dcp)
        require_tied(header, reader)
        keys = {name: header.names.weights[name] for name in names}
        return _Source(header, keys, reader, config_file(source, config), _left_in(header))
    if config is not None:
        raise CheckpointError(f"--config is for distributed checkpoints without one; {source} has its own, leave it out")
    stored_header = read_header(source)
    return _Source(stored_header, {name: name for name in _claimed(stored_header)}, TensorReader(stored_header),
                   source / CONFIG)  # fmt: skip


def _claimed(header: Header) -> list[str]:
    architecture = architecture_of(header.config)
    return list(claim(header, architecture, architecture.sizes(header.config)))


def _left_in(header: DcpHeader) -> tuple[str, ...]:
    """What of a DCP directory safetensors cannot say, in short."""
    kinds: dict[str, int] = {}
    for _, kind in header.moments:
        kinds[kind] = kinds.get(kind, 0) + 1
    left = [f"{count} tensors {kind}: optimizer state" for kind, count in kinds.items()]
    others = [*header.names.carried, *header.dcp.blobs]
    if others:
        left.append(f"{len(others)} values beside the weights, such as {others[0]}: training state")
    return tuple(left)


_Layouts = tuple[Sequence[FileLayout], Mapping[str, bytes], Mapping[str, str]]


def _safetensors(source: _Source, targets: Sequence[TargetTensor], max_file_bytes: int) -> _Layouts:
    layouts = plan_shards(targets, max_file_bytes, source.header.metadata)
    return layouts, {INDEX_FILE: index_json(layouts)} if len(layouts) > 1 else {}, source.keys


def _dcp(source: _Source, targets: Sequence[TargetTensor], max_file_bytes: int) -> _Layouts:
    """Weights under `model.`; a tied head also under its own name, since a state dict of transformers has both."""
    named = {target.name: target for target in targets}
    keys = dict(source.keys)
    architecture = architecture_of(source.header.config)
    if architecture.is_tied(source.header.config):
        embedding = named[architecture.embedding]
        named[architecture.head] = embedding
        keys[architecture.head] = keys[architecture.embedding]
    tensors = [TargetTensor(f"{TREE}.{name}", target.dtype, target.shape) for name, target in named.items()]
    layout = plan_dcp(tensors, {}, {f"{TREE}.{name}": (TREE, name) for name in named}, max_file_bytes)
    return layout.files, {METADATA_FILE: layout.metadata}, {f"{TREE}.{name}": key for name, key in keys.items()}


def _write_tensors(
    reader: _Reader, layout: FileLayout, keys: Mapping[str, str], directory: Path, progress: Progress | None
) -> None:
    with FileWriter(directory / layout.file, layout) as writer:
        for tensor in layout.tensors:
            num_rows = tensor.shape[0] if tensor.shape else 1
            step = max(1, _CHUNK_BYTES * num_rows // max(1, tensor.num_bytes))
            for begin in range(0, num_rows, step):
                rows = tensor_bytes(reader.rows(keys[tensor.name], begin, min(begin + step, num_rows)))
                writer.write(rows)
                if progress:
                    progress(len(rows))
        writer.close()


def _require_apart(source: Path, target: Path) -> None:
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
        raise OutputError(f"{target} lies in the source {source}, which is never changed; choose another output")


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(f"{source} cannot be copied to {target} ({error.strerror}); check both") from None


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free or choose another place") from None
