"""Put a checkpoint's weights into another format, as a stream and bit for bit: safetensors and DCP, both ways."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gdagrow.archs import Architecture, architecture_of
from gdagrow.choices import Format
from gdagrow.dcp import CONFIG, DcpHeader, config_file, read_dcp
from gdagrow.dcp_tensors import DcpTensors, require_tied
from gdagrow.errors import CheckpointError, OutputError
from gdagrow.formats.companions import SkippedFile, copy_companions, list_companions
from gdagrow.formats.dcp_layout import plan_dcp
from gdagrow.formats.dcp_metadata import METADATA_FILE
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.kind import format_of, place_of_weights
from gdagrow.formats.links import require_inside
from gdagrow.formats.publish import check_free_space, require_all, require_apart, staged, write_file
from gdagrow.formats.safetensors_header import INDEX_FILE, read_header
from gdagrow.formats.safetensors_layout import index_json, plan_shards
from gdagrow.formats.watched import WatchedFiles
from gdagrow.header import Header
from gdagrow.layout import CHUNK_BYTES
from gdagrow.reading import RowReader, open_reader
from gdagrow.record import RECORD_FILE
from gdagrow.rows import claim

# What a trainer saves with `{"model": model.state_dict()}`, and loads into it.
DEFAULT_PREFIX: Final = "model."
_SPARE_BYTES: Final = 2**20  # for config, index and record

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion will write.

    header: The source.
    layouts: The files of weights.
    tensors: What stands in them, by name there: the weight's name in the source.
    files: The content of small files, by name; they are written last.
    config: The model's `config.json`, which is copied as it is.
    companions: The directory whose other files come along.
    left_behind: What of the source the format cannot hold, and why.
    """

    header: Header
    layouts: tuple[FileLayout, ...]
    tensors: Mapping[str, str]
    files: Mapping[str, bytes]
    config: Path
    companions: Path
    left_behind: tuple[SkippedFile, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of weights to write."""
        return sum(layout.data_bytes for layout in self.layouts)


@dataclass(frozen=True)
class Converted:
    """What was written: the directory, the files beside the weights, and what was left behind and why."""

    target: Path
    copied: tuple[str, ...]
    left_behind: tuple[SkippedFile, ...]


def plan_conversion(
    source: Path, to: Format, *, config: Path | None = None, prefix: str | None = None, max_file_bytes: int
) -> Conversion:
    """Plan a conversion; of weights, only a tied head that is stored twice is read.

    Args:
        source: A directory of safetensors weights, or a DCP directory.
        to: The format to write.
        config: The `config.json` of a DCP directory that has none, or a directory that has it; from such a directory
            the companion files (tokenizer and so on) come too.
        prefix: What stands before a weight's name in its key in DCP: the path of its state dict in the one that a
            trainer loads, each name followed by a dot; `model.` if None.
        max_file_bytes: The largest weight file, unless a single tensor is larger.

    Raises:
        CheckpointError: the source cannot be read, has the format already, or is no model that gdagrow knows.
        OutputError: the prefix is none, or the format has none.
    """
    if format_of(source) == to:
        raise CheckpointError(f"{source} stores its weights as {to} already; there is nothing to convert")
    if to == Format.safetensors:
        if prefix is not None:
            raise OutputError("--prefix is of keys in dcp, and safetensors has the parameters' own names; leave it out")
        return _to_safetensors(source, config, max_file_bytes)
    if config is not None:
        raise CheckpointError(
            f"--config is for distributed checkpoints; {source} has a {CONFIG} of its own, leave it out"
        )
    prefix = DEFAULT_PREFIX if prefix is None else prefix
    if not re.fullmatch(r"([^.\s]+\.)*", prefix) or not prefix.isprintable():
        raise OutputError(f"--prefix: expected names with a dot behind each, such as model., or '', got {prefix!r}")
    return _to_dcp(source, prefix, max_file_bytes)


def convert_format(conversion: Conversion, target: Path, *, progress: Progress | None = None) -> Converted:
    """Carry out a conversion into `target`, which appears whole or not at all.

    Args:
        conversion: What to write.
        target: The directory to make; it may exist if it is empty.
        progress: Called with the number of bytes written since its last call.

    Raises:
        CheckpointError: the source changes meanwhile.
        OutputError: the target exists, there is no room, or the disk refuses.
    """
    source, beside, place = conversion.header.directory, conversion.companions, Path(os.path.abspath(target))
    for directory in (source, beside):
        require_apart(directory, place)
    companions = list_companions(beside)
    record = require_inside(beside, beside / RECORD_FILE)
    watched = WatchedFiles(source, conversion.header.shards)
    with staged(place) as partial, open_reader(conversion.header) as reader:
        num_bytes = sum((beside / name).stat().st_size for name in companions.copied)
        num_bytes += sum(layout.file_bytes for layout in conversion.layouts)
        check_free_space(place.parent, num_bytes + _SPARE_BYTES)
        copy_companions(beside, partial)
        _copy(conversion.config, partial / CONFIG)
        if record.is_file():
            _copy(record, partial / RECORD_FILE)
        for layout in conversion.layouts:
            _write_tensors(reader, layout, conversion.tensors, partial, progress)
        for name, content in conversion.files.items():
            write_file(partial / name, content)
        require_all(partial, [CONFIG, *companions.copied, *(f.file for f in conversion.layouts), *conversion.files])
        watched.require_unchanged()
    own = {CONFIG, RECORD_FILE, INDEX_FILE, METADATA_FILE, *conversion.header.shards}
    # Nothing is grown here: of the reason, only what the file is.
    skipped = tuple(SkippedFile(skip.path, skip.reason.partition(",")[0])
                    for skip in companions.skipped if skip.path not in own)  # fmt: skip
    return Converted(target, companions.copied, conversion.left_behind + skipped)


def _to_safetensors(source: Path, config: Path | None, max_file_bytes: int) -> Conversion:
    header = read_dcp(source, config, place_of_weights(source))
    names = _claimed(header, architecture_of(header.config))
    with DcpTensors(header) as reader:
        require_tied(header, reader)
    layouts = plan_shards([_target(header, name, name) for name in names], max_file_bytes)
    files = {INDEX_FILE: index_json(layouts)} if len(layouts) > 1 else {}
    beside = config if config is not None and config.is_dir() else source
    return Conversion(header, layouts, {name: name for name in names}, files, config_file(source, config), beside,
                      tuple(_left_in(header)))  # fmt: skip


def _to_dcp(source: Path, prefix: str, max_file_bytes: int) -> Conversion:
    header = read_header(source)
    architecture = architecture_of(header.config)
    weights = {name: name for name in _claimed(header, architecture)}
    if architecture.is_tied(header.config):
        # The state dict of a tied model in transformers has both names, and DCP loads what a state dict asks for.
        weights[architecture.head] = architecture.embedding
    tree = prefix.split(".")[:-1]
    layout = plan_dcp(
        [_target(header, stored, prefix + name) for name, stored in weights.items()],
        {},
        {prefix + name: (*tree, name) for name in weights},
        max_file_bytes,
    )
    tensors = {prefix + name: stored for name, stored in weights.items()}
    return Conversion(header, layout.files, tensors, {METADATA_FILE: layout.metadata}, source / CONFIG, source, ())


def _claimed(header: Header, architecture: Architecture) -> list[str]:
    return list(claim(header, architecture, architecture.sizes(header.config)))


def _target(header: Header, stored: str, name: str) -> TargetTensor:
    info = header.tensors[stored]
    return TargetTensor(name, info.dtype, info.shape)


def _left_in(header: DcpHeader) -> list[SkippedFile]:
    """What of a DCP directory safetensors cannot hold, in short."""
    kinds: dict[str, list[str]] = {}
    for (_, kind), info in header.moments.items():
        kinds.setdefault(kind, []).append(info.name)
    left = [SkippedFile(f"{keys[0]} and {len(keys) - 1} more", "optimizer state") for keys in kinds.values()]
    if others := [*header.names.carried, *header.dcp.blobs]:
        left.append(SkippedFile(f"{others[0]} and {len(others) - 1} more", "training state, no weights"))
    return left


def _write_tensors(
    reader: RowReader, layout: FileLayout, names: Mapping[str, str], directory: Path, progress: Progress | None
) -> None:
    with FileWriter(directory / layout.file, layout) as writer:
        for tensor in layout.tensors:
            num_rows = tensor.shape[0] if tensor.shape else 1
            step = max(1, CHUNK_BYTES * num_rows // max(1, tensor.num_bytes))
            for begin in range(0, num_rows, step):
                rows = tensor_bytes(reader.rows(names[tensor.name], begin, min(begin + step, num_rows)))
                writer.write(rows)
                if progress:
                    progress(len(rows))
        writer.close()


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(f"{source} cannot be copied to {target} ({error.strerror}); check both") from None
