"""Write a random Motif checkpoint of a given size, streaming, for benchmarks."""

import json
from pathlib import Path

import torch

from gdagrow.archs.motif import Motif
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.safetensors_layout import plan_shards

DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
_CHUNK_ELEMENTS = 2**22
_VOCAB = 32000
_LAYER_ELEMENTS_PER_HIDDEN_SQUARED = 15.5  # q 1, k 0.5, v 0.5, o 1.5, three FFN matrices of 4


def write_source(directory: Path, *, gigabytes: float, dtype: str) -> int:
    """Write a checkpoint of about `gigabytes`, of hidden size 2048 unless it is small; returns its weights' bytes."""
    hidden, item = 2048 if gigabytes >= 0.3 else 512, DTYPES[dtype][1].itemsize
    layer = _LAYER_ELEMENTS_PER_HIDDEN_SQUARED * hidden**2 * item
    num_layers = max(1, round((gigabytes * 1e9 - 2 * _VOCAB * hidden * item) / layer))
    return write_checkpoint(directory, num_layers=num_layers, hidden=hidden, dtype=dtype)


def write_checkpoint(directory: Path, *, num_layers: int, hidden: int, dtype: str) -> int:
    """Write a 3:1 GDA checkpoint with head_dim 128, an FFN of four times `hidden` and a vocabulary of 32000.

    Returns:
        The bytes of its weights.
    """
    code, torch_dtype = DTYPES[dtype]
    groups = hidden // 512
    config = {
        "model_type": "motif", "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": num_layers,
        "num_attention_heads": 4 * groups, "num_noise_heads": groups, "num_key_value_heads": 2 * groups,
        "head_dim": 128, "vocab_size": _VOCAB, "hidden_act": "poly_norm", "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "max_position_embeddings": 16384,
    }  # fmt: skip
    motif = Motif()
    axes = motif.sizes(config).axes
    tensors = [
        TargetTensor(row.name.format(layer=layer), code, row.parsed.shape(axes))
        for row in motif.table(config) if not row.optional
        for layer in range(num_layers if row.is_layered else 1)
    ]  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (layout,) = plan_shards(tensors, 10**15)
    # The same normal weights over and over: what is in them does not change the work.
    weights = (torch.randn(_CHUNK_ELEMENTS, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch_dtype)
    octets = tensor_bytes(weights)
    with FileWriter(directory / layout.file, layout) as writer:
        for tensor in layout.tensors:
            left = tensor.num_bytes
            while left:
                writer.write(octets[: min(left, len(octets))])
                left -= min(left, len(octets))
        writer.close()
    return layout.data_bytes
