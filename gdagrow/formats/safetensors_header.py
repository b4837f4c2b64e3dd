"""Read what a safetensors checkpoint directory says of itself, strictly, without reading a weight.

The file format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length N, N bytes of JSON
that start with `{`, then the tensors' bytes, every byte of them owned by exactly one tensor.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gdagrow.errors import CheckpointError
from gdagrow.formats.links import require_inside
from gdagrow.formats.small_file import MAX_BYTES, read_small_file
from gdagrow.formats.strict_json import parse_object
from gdagrow.header import ITEM_BYTES, Header, TensorInfo

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = MAX_BYTES  # the format's own limit
_MAX_INT: Final = 2**63 - 1
_ENTRY_KEYS: Final = {"dtype", "shape", "data_offsets"}


def read_header(directory: Path) -> Header:
    """Read `config.json` and the headers of all weight files; tensors come in shard order, then storage order.

    Where shards give different values for a metadata key, the last shard's is kept.

    Raises:
        CheckpointError: the directory is not a complete, consistent safetensors checkpoint.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a directory; give the directory of a safetensors checkpoint")
    config = _read_json(directory, "config.json")
    single, index = (os.path.lexists(directory / name) for name in (SINGLE_FILE, INDEX_FILE))
    if single and index:
        raise CheckpointError(
            f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}, so it is ambiguous which holds the model; "
            "remove the one that is stale"
        )
    if not single and not index:
        raise CheckpointError(
            f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}; only safetensors weights are read, convert others"
        )
    weight_map = read_weight_map(directory) if index else None
    shards = sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]
    infos: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    for shard in shards:
        found, shard_metadata = read_shard(_regular_file(directory, shard))
        infos += found.values()
        metadata.update(shard_metadata)
    if weight_map and (misplaced := _misplaced(infos, weight_map)):
        raise CheckpointError(
            f"{directory}: {INDEX_FILE} and the shards disagree: {'; '.join(misplaced)}; download the checkpoint again"
        )
    if not infos:
        raise CheckpointError(f"{directory} holds no tensors; give a checkpoint with weights")
    return Header(directory, config, {info.name: info for info in infos}, metadata)


def read_shard(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read one safetensors file's tensors, in storage order, and its metadata.

    Raises:
        CheckpointError: the file is not exactly as the format demands.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = _read_raw_header(path, file, file_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
    entries = parse_object(raw, f"{path} (header)")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(value) for value in (*metadata, *metadata.values())):
        raise CheckpointError(f"{path}: expected __metadata__ to map strings to strings; restore the file")
    data_start = 8 + len(raw)
    infos = []
    for name, entry in entries.items():
        try:
            infos.append(_tensor_info(name, entry, path.name, data_start))
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}; restore the file") from None
    infos.sort(key=_by_position)
    _check_cover(path, infos, data_start, file_bytes)
    return {info.name: info for info in infos}, metadata


def _by_position(info: TensorInfo) -> tuple[int, int]:
    return info.start, info.stop


def _read_raw_header(path: Path, file: Any, file_bytes: int) -> bytes:
    if file_bytes < 8:
        raise CheckpointError(
            f"{path}: expected at least the 8 bytes of a safetensors header length, got {file_bytes} bytes; "
            "download the file again"
        )
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got a claim of {header_bytes} bytes; "
            "this is not a safetensors file"
        )
    if 8 + header_bytes > file_bytes:
        raise CheckpointError(
            f"{path}: expected a header of {header_bytes} bytes, got a file of {file_bytes} bytes in all; "
            "the file is truncated, download it again"
        )
    raw: bytes = file.read(header_bytes)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: expected a header that starts with '{{', got {raw[:8]!r}; restore the file")
    return raw


def _tensor_info(name: str, entry: Any, shard: str, data_start: int) -> TensorInfo:
    """Check one header entry; raises ValueError with what is wrong with it."""
    if not name.isprintable():
        raise ValueError("expected a printable name")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"expected an object with dtype, shape and data_offsets, got {got}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(ITEM_BYTES)}")
    if not _all_sizes(shape):
        raise ValueError(f"expected a shape of non-negative integers, got {shape!r}")
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"expected data_offsets of two ascending non-negative integers, got {offsets!r}")
    num_bytes = ITEM_BYTES[dtype]
    for size in shape:
        num_bytes *= size
        if num_bytes > _MAX_INT:
            raise ValueError(f"shape {shape!r} overflows 63 bits of bytes")
    start, stop = offsets
    if stop - start != num_bytes:
        raise ValueError(
            f"expected {num_bytes} bytes for shape {shape!r} of {dtype}, got {stop - start} by its offsets"
        )
    return TensorInfo(name, dtype, tuple(shape), shard, data_start + start, data_start + stop)


def _all_sizes(value: Any) -> bool:
    # type(), not isinstance(): JSON's true would pass for 1.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INT for item in value)


def _is_text(value: Any) -> bool:
    # JSON can spell half a surrogate pair, which no UTF-8 file can hold.
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def _check_cover(path: Path, infos: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Check that the tensors, sorted by position, own every data byte of the file exactly once."""
    end = data_start
    before = "the header"
    for info in infos:
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} {fault} {before}: expected it to start at byte {end}, got {info.start}; "
                "restore the file"
            )
        end, before = info.stop, repr(info.name)
    if end > file_bytes:
        outside = next(info.name for info in infos if info.stop > file_bytes)
        raise CheckpointError(
            f"{path} is truncated: expected {end} bytes, got {file_bytes}, so tensor {outside!r} lies outside the "
            "file; download it again"
        )
    if end < file_bytes:
        raise CheckpointError(
            f"{path}: expected {end} bytes by its header, got {file_bytes}: {file_bytes - end} bytes belong to no "
            "tensor; restore the file"
        )


def _misplaced(infos: list[TensorInfo], weight_map: Mapping[str, str]) -> list[str]:
    """Say which tensors are not in exactly the shard that the index names for them."""
    found = {info.name for info in infos}
    return [f"{name!r} is missing from {shard}" for name, shard in weight_map.items() if name not in found] + [
        f"{info.name!r} is in {info.shard}, but the index says {weight_map.get(info.name, 'nothing of it')}"
        for info in infos
        if weight_map.get(info.name) != info.shard
    ]


def read_weight_map(directory: Path) -> dict[str, str]:
    weight_map = _read_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_FILE}: expected a non-empty object weight_map; restore the file")
    bad = sorted({repr(shard) for shard in weight_map.values() if not _is_plain_name(shard)})
    if bad:
        raise CheckpointError(
            f"{directory / INDEX_FILE}: expected plain file names in weight_map, got {', '.join(bad)}; restore the file"
        )
    return weight_map


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not {"/", "\\"} & set(name)


def _regular_file(directory: Path, name: str) -> Path:
    path = directory / name
    real = require_inside(directory, path)
    if not os.path.isfile(real):
        raise CheckpointError(f"{directory} has no file {name}; restore it or download the checkpoint again")
    return path


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = _regular_file(directory, name)
    return parse_object(read_small_file(path), str(path))
