"""Read what a torch distributed checkpoint (DCP) says of itself: the file `.metadata`, strictly and without running it.

A DCP directory holds `.metadata`, a pickle of `torch.distributed.checkpoint.metadata.Metadata`, and `.distcp` files. A
tensor is stored in chunks, boxes of it that the ranks of a run held; each chunk is a blob in one of the files, and a
blob is a whole `torch.save` file of one tensor. Values that are no tensors are blobs as well. Source: torch's
`torch/distributed/checkpoint/{metadata,filesystem}.py`, format version 1.0.0.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Final

from gdagrow.errors import CheckpointError
from gdagrow.formats.links import require_inside
from gdagrow.formats.pickle_tree import Global, Made, PickleRefusedError, parse, refused
from gdagrow.formats.small_file import read_small_file
from gdagrow.formats.watched import FileStat, file_stat
from gdagrow.header import ITEM_BYTES

METADATA_FILE: Final = ".metadata"

# torch's name of a dtype to its safetensors code; others (complex, quantised) are refused by name.
DTYPE_CODES: Final[Mapping[str, str]] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"
_PATHS: Final = ("pathlib", "pathlib._local")  # Python 3.13 moved the classes
_ADMITTED: Final = frozenset(
    [(_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )]
    + [(_FILESYSTEM, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
       ("collections", "OrderedDict")]
    + [("torch", name) for name in (*DTYPE_CODES, "complex32", "complex64", "complex128", "quint8", "qint8", "qint32",
                                    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")]
    + [(module, name) for module in _PATHS for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")]
)  # fmt: skip
_MAX_INT: Final = 2**63 - 1
_MAX_BYTES: Final = 2**30  # of `.metadata`: some hundred for each chunk


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes `[start, start + length)` of a file of the directory: a whole `torch.save` file, or a raw value."""

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The box of a tensor that begins at `offsets` and measures `sizes`, and the blob that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: Blob


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a DCP directory: its safetensors dtype code, its shape, and chunks that cover it exactly once.

    chunks: Those that hold anything, sorted by offsets; they form a grid.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class DcpMetadata:
    """A DCP directory without its values.

    tensors, blobs: Every tensor, and every value that is none, by key in the order stored.
    paths: Key to its path in the nested state dict that was saved (strings name, whole numbers index), where known.
    files: Each file that is named, and what the system said of it: inode, size in bytes, time of change in ns.
    """

    directory: Path
    tensors: Mapping[str, StoredTensor]
    blobs: Mapping[str, Blob]
    paths: Mapping[str, tuple[str | int, ...]]
    files: Mapping[str, FileStat]


def is_dcp(directory: Path) -> bool:
    """Whether a directory is meant as a DCP checkpoint."""
    return os.path.lexists(directory / METADATA_FILE)


def read_metadata(directory: Path) -> DcpMetadata:
    """Read `.metadata`; no value is read.

    Raises:
        CheckpointError: it is missing or damaged, holds anything but the metadata of a DCP checkpoint, or names bytes
            that are not there; chunks leave a gap or overlap.
    """
    path = require_inside(directory, directory / METADATA_FILE)
    if not os.path.isfile(path):
        ranks = sorted(path.name for path in directory.glob(f"__*{METADATA_FILE}"))
        why = f"it has {ranks[0]}, so each rank was saved by itself; save with collectives" if ranks else "give another"
        raise CheckpointError(f"{directory} is no distributed checkpoint: it has no file {METADATA_FILE}; {why}")
    try:
        return _metadata(directory, parse(read_small_file(path, _MAX_BYTES), _ADMITTED))
    except PickleRefusedError as error:
        raise refused(path, error) from None
    except _MalformedError as error:
        raise CheckpointError(f"{path}: {error}; restore the checkpoint or save it again") from None


class _MalformedError(ValueError):
    """What is wrong with the metadata."""


def _metadata(directory: Path, root: Any) -> DcpMetadata:
    fields = _state(root, "Metadata")
    stored, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(stored) is not dict or not all(type(key) is str for key in stored):
        raise _MalformedError("expected names in state_dict_metadata")
    if unprintable := sorted(repr(key) for key in stored if not key.isprintable()):
        raise _MalformedError(f"expected printable names, got {', '.join(unprintable)}")
    if type(places) is not dict:
        raise _MalformedError("expected a table storage_data of where the chunks are")
    blobs: dict[tuple[str, tuple[int, ...] | None], Blob] = {}
    for index, info in places.items():
        place = _index(index)
        if place in blobs or place[0] not in stored:
            raise _MalformedError(f"{place[0]!r}: storage_data has it twice, or knows no such name")
        try:
            blobs[place] = _blob(info)
        except _MalformedError as error:
            raise _MalformedError(f"{place[0]!r}: {error}") from None
    files = _files(directory, blobs)
    tensors: dict[str, StoredTensor] = {}
    others: dict[str, Blob] = {}
    for key, entry in stored.items():
        if _is(entry, "BytesStorageMetadata"):
            if (key, None) not in blobs:
                raise _MalformedError(f"{key!r}: storage_data does not say where it is")
            others[key] = blobs[key, None]
            continue
        try:
            tensors[key] = _tensor(key, _state(entry, "TensorStorageMetadata"), blobs)
        except _MalformedError as error:
            raise _MalformedError(f"tensor {key!r}: {error}") from None
    return DcpMetadata(directory, tensors, others, dict(_paths(fields.get("planner_data"), stored)), files)


def _tensor(key: str, fields: Mapping[str, Any], blobs: Mapping[Any, Blob]) -> StoredTensor:
    shape, dtype = _size(fields.get("size")), _dtype(fields.get("properties"))
    if prod(shape) > _MAX_INT // ITEM_BYTES[dtype]:
        raise _MalformedError(f"shape {list(shape)} overflows 63 bits of bytes")
    listed = fields.get("chunks")
    if type(listed) is not list:
        raise _MalformedError("expected a list of chunks")
    chunks = []
    for entry in listed:
        box = _state(entry, "ChunkStorageMetadata")
        offsets, sizes = _size(box.get("offsets")), _size(box.get("sizes"))
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise _MalformedError(f"a chunk at {list(offsets)} of {list(sizes)} in the shape {list(shape)}")
        # Ranks that held nothing of it say so with chunks of no rows, which may come many times.
        if prod(sizes):
            if (key, offsets) not in blobs:
                raise _MalformedError(f"storage_data does not say where its chunk at {list(offsets)} is")
            chunks.append(Chunk(offsets, sizes, blobs[key, offsets]))
    chunks.sort(key=lambda chunk: (chunk.offsets, chunk.sizes))
    if prod(shape):
        _require_cover(chunks, shape, 0)
    elif chunks:
        raise _MalformedError(f"has chunks though its shape is {list(shape)}")
    for chunk in chunks:
        if chunk.blob.length < prod(chunk.sizes) * ITEM_BYTES[dtype]:
            raise _MalformedError(f"its chunk at {list(chunk.offsets)} has fewer bytes than {list(chunk.sizes)} takes")
    return StoredTensor(key, dtype, shape, tuple(chunks))


def _require_cover(chunks: list[Chunk], shape: tuple[int, ...], dim: int) -> None:
    """Check that chunks, sorted by offsets, hold every element exactly once, as a grid does from dimension `dim` on."""
    if dim == len(shape):
        if len(chunks) != 1:
            raise _MalformedError(f"{len(chunks)} chunks hold the same, at {list(chunks[0].offsets)}")
        return
    bands: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        bands.setdefault((chunk.offsets[dim], chunk.sizes[dim]), []).append(chunk)
    end = 0
    for (start, size), band in sorted(bands.items()):
        if start != end:
            fault = "overlap" if start < end else "leave a gap"
            raise _MalformedError(f"its chunks {fault} along dimension {dim}: expected one from {end}, got {start}")
        _require_cover(band, shape, dim + 1)
        end = start + size
    if end != shape[dim]:
        raise _MalformedError(f"its chunks cover {end} of dimension {dim} in the shape {list(shape)}")


def _index(node: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _state(node, "MetadataIndex")
    name, offset = fields.get("fqn"), fields.get("offset")
    if type(name) is not str:
        raise _MalformedError("expected a name in each MetadataIndex")
    return name, None if offset is None else _size(offset)


def _blob(node: Any) -> Blob:
    fields = _state(node, "_StorageInfo", _FILESYSTEM)
    file, start, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if type(file) is not str or not _is_plain(file):
        got = repr(file[:200]) if type(file) is str else "something else"
        raise _MalformedError(f"expected the path of a file inside the directory, got {got}")
    if type(start) is not int or type(length) is not int or min(start, length) < 0 or max(start, length) > _MAX_INT:
        raise _MalformedError("expected whole numbers of bytes for offset and length")
    if fields.get("transform_descriptors"):
        raise _MalformedError("it was stored through a transformation (compression), which is not read; save without")
    return Blob(file, start, length)


def _is_plain(file: str) -> bool:
    path = PurePosixPath(file)
    return file.isprintable() and "\\" not in file and bool(path.parts) and not path.is_absolute() and (
        ".." not in path.parts)  # fmt: skip


def _files(directory: Path, blobs: Mapping[tuple[str, Any], Blob]) -> dict[str, FileStat]:
    ends: dict[str, tuple[int, str]] = {}
    for (key, _), blob in blobs.items():
        ends[blob.file] = max(ends.get(blob.file, (0, "")), (blob.start + blob.length, key))
    files = {}
    for file, (end, key) in sorted(ends.items()):
        path = require_inside(directory, directory / file)
        if path.suffix == ".safetensors":
            raise _MalformedError(f"{file} holds safetensors inside DCP, which is not read; give the model's directory")
        if not os.path.isfile(path):
            raise _MalformedError(f"there is no file {file}, where it says that {key!r} is")
        files[file] = file_stat(path.stat())
        if end > files[file].num_bytes:
            raise _MalformedError(
                f"{file} is truncated: {key!r} ends at byte {end}, and it has {files[file].num_bytes}"
            )
    return files


def _dtype(properties: Any) -> str:
    state = _made(properties, "TensorProperties").state
    if type(state) is not tuple or len(state) != 5 or type(state[0]) is not Global or state[0].module != "torch":
        raise _MalformedError("expected a dtype in its properties")
    layout = state[1]
    if type(layout) is Made and layout.args != ("torch.strided",):
        raise _MalformedError("expected a strided tensor; convert sparse ones")
    if state[0].name not in DTYPE_CODES:
        raise _MalformedError(f"dtype {state[0].name}, expected one of {', '.join(DTYPE_CODES)}")
    return DTYPE_CODES[state[0].name]


def _paths(planner_data: Any, keys: Iterable[str]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    known = planner_data if type(planner_data) is dict else {}
    for key in keys:
        path = known.get(key)
        if type(path) is tuple and path and all(type(part) in (str, int) for part in path):
            yield key, path


def _size(node: Any) -> tuple[int, ...]:
    sizes = node.args[0] if type(node) is Made and node.function == _SIZE and len(node.args) == 1 else None
    if type(sizes) is not tuple or not all(type(size) is int and 0 <= size <= _MAX_INT for size in sizes):
        raise _MalformedError("expected sizes of whole numbers")
    return sizes


_SIZE: Final = Global("torch", "Size")


def _is(node: Any, name: str, module: str = _METADATA) -> bool:
    return type(node) is Made and node.function.name == name and node.function.module == module


def _made(node: Any, name: str, module: str = _METADATA) -> Made:
    if not _is(node, name, module):
        raise _MalformedError(f"expected a {name}, got something else")
    made: Made = node
    return made


def _state(node: Any, name: str, module: str = _METADATA) -> Mapping[Any, Any]:
    state = _made(node, name, module).state
    if type(state) is not dict:
        raise _MalformedError(f"expected a {name} with its fields")
    return state
