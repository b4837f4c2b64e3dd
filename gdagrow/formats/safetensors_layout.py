"""Lay out safetensors shards: which tensors stand in which file, behind which header."""

import json
from collections.abc import Mapping, Sequence

from gdagrow.errors import OutputError
from gdagrow.formats.file_layout import FileLayout, TargetTensor, by_file
from gdagrow.formats.safetensors_header import MAX_HEADER_BYTES, SINGLE_FILE
from gdagrow.header import ITEM_BYTES


def plan_shards(
    tensors: Sequence[TargetTensor], max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> tuple[FileLayout, ...]:
    """Fill shards with `tensors` in the order given, at most `max_shard_bytes` of tensors in each.

    A tensor larger than that has a shard of its own. Inside a shard the larger item sizes come first, so that every
    tensor is aligned to its item size. `metadata` is written to every shard, beside `format: pt`.

    Raises:
        OutputError: a shard would hold more tensors than a safetensors header can name, or one with a name that stands
            there already, such as the format's own `__metadata__`.
    """
    groups = by_file(tensors, max_shard_bytes)
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    texts = {"format": "pt", **(metadata or {})}
    return tuple(_layout(name, group, texts) for name, group in zip(names, groups, strict=True))


def _layout(file: str, tensors: Sequence[TargetTensor], metadata: Mapping[str, str]) -> FileLayout:
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for tensor in ordered:
        if tensor.name in fields:
            raise OutputError(f"{file}: a tensor cannot be named {tensor.name!r} in safetensors; rename it")
        stop = start + tensor.num_bytes
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{file} would need a header of {len(text)} bytes for {len(tensors)} tensors, expected at most "
            f"{MAX_HEADER_BYTES}; ask for smaller shards"
        )
    return FileLayout(file, tuple(ordered), ((0, len(text).to_bytes(8, "little") + text),))


def index_json(layouts: Sequence[FileLayout]) -> bytes:
    """Return the content of `model.safetensors.index.json` for these shards."""
    weight_map = {tensor.name: layout.file for layout in layouts for tensor in layout.tensors}
    total_size = sum(layout.data_bytes for layout in layouts)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
