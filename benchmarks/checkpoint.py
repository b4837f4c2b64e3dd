"""Write a random Motif checkpoint of a given size, streaming, for benchmarks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gdagrow.archs.motif import Motif
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.safetensors_layout import index_json, plan_shards

DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
# A prime near 2^22: no tensor, and no row of one, starts again with the values of another.
_RING_ELEMENTS = 4_194_301
_VOCAB = 32000
_LAYER_ELEMENTS_PER_HIDDEN_SQUARED = 15.5  # q 1, k 0.5, v 0.5, o 1.5, three FFN matrices of 4


def write_source(directory: Path, *, gigabytes: float, dtype: str, max_shard_bytes: int = 10**15) -> int:
    """Write a checkpoint of about `gigabytes`, of hidden size 2048 unless it is small; returns its weights' bytes."""
    hidden, item = 2048 if gigabytes >= 0.3 else 512, DTYPES[dtype][1].itemsize
    layer = _LAYER_ELEMENTS_PER_HIDDEN_SQUARED * hidden**2 * item
    num_layers = max(1, round((gigabytes * 1e9 - 2 * _VOCAB * hidden * item) / layer))
    config = gda_config(num_layers=num_layers, hidden=hidden)
    return write_checkpoint(directory, config, dtype=dtype, max_shard_bytes=max_shard_bytes)


def gda_config(*, num_layers: int, hidden: int) -> dict[str, Any]:
    """A 3:1 GDA model with head_dim 128, an FFN of four times `hidden` and a vocabulary of 32000."""
    groups = hidden // 512
    return {
        "model_type": "motif", "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": num_layers,
        "num_attention_heads": 4 * groups, "num_noise_heads": groups, "num_key_value_heads": 2 * groups,
        "head_dim": 128, "vocab_size": _VOCAB, "hidden_act": "poly_norm", "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "max_position_embeddings": 16384,
    }  # fmt: skip


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a Motif model of this config has without biases, by name, layer by layer."""
    motif = Motif()
    axes = motif.sizes(config).axes
    rows = [row for row in motif.table(config) if not row.optional]
    first = next(index for index, row in enumerate(rows) if row.is_layered)
    layered = [row for row in rows if row.is_layered]
    in_order = [
        *((row, 0) for row in rows[:first]),
        *((row, layer) for layer in range(config["num_hidden_layers"]) for row in layered),
        *((row, 0) for row in rows[first:] if not row.is_layered),
    ]
    return {row.name.format(layer=layer): row.parsed.shape(axes) for row, layer in in_order}


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], *, dtype: str, lambda_dtype: str | None = None,
    max_shard_bytes: int = 10**15,
) -> int:  # fmt: skip
    """Write random weights of a Motif model: 1 and a little in norms and PolyNorm, normal ones of 0.02 elsewhere.

    Args:
        lambda_dtype: What `lambda_*` are stored in; `dtype` if None.
        max_shard_bytes: How many bytes of tensors a file holds at most.

    Returns:
        The bytes of its weights.
    """
    tensors = [
        TargetTensor(name, DTYPES[lambda_dtype or dtype if ".lambda_" in name else dtype][0], shape)
        for name, shape in shapes_of(config).items()
    ]
    layouts = plan_shards(tensors, max_shard_bytes)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if len(layouts) > 1:
        (directory / "model.safetensors.index.json").write_bytes(index_json(layouts))
    values = torch.randn(_RING_ELEMENTS, generator=torch.Generator().manual_seed(0)) * 0.02
    rings = {
        (code, mean): _Ring(tensor_bytes((values + mean).to(stored))) for code, stored in DTYPES.values()
        for mean in (0, 1)
    }  # fmt: skip
    for layout in layouts:
        with FileWriter(directory / layout.file, layout) as writer:
            for tensor in layout.tensors:
                is_gain = len(tensor.shape) == 1 and ".lambda_" not in tensor.name and not tensor.name.endswith("bias")
                rings[tensor.dtype, int(is_gain)].write(writer, tensor.num_bytes)
            writer.close()
    return sum(layout.data_bytes for layout in layouts)


class _Ring:
    """The same bytes over and over, without end."""

    def __init__(self, octets: memoryview) -> None:
        self._octets, self._next = octets, 0

    def write(self, writer: FileWriter, num_bytes: int) -> None:
        while num_bytes:
            part = self._octets[self._next : self._next + num_bytes]
            writer.write(part)
            num_bytes -= len(part)
            self._next = (self._next + len(part)) % len(self._octets)
