"""What a checkpoint directory says of its tensors before `transformers` loads it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtypes(name_or_path: Any, subfolder: str) -> dict[str, torch.dtype]:
    """The dtype of every floating-point tensor of a local directory; empty for all else."""
    if name_or_path is None:
        return {}
    directory = Path(name_or_path, subfolder)
    index = directory / "model.safetensors.index.json"
    files = {directory / "model.safetensors"}
    if not directory.joinpath("model.safetensors").is_file() and index.is_file():
        files = {directory / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    found: dict[str, torch.dtype] = {}
    for path in files:
        if path.is_file():
            with safe_open(path, "pt") as file:
                codes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            found |= {name: _DTYPES[code] for name, code in codes.items() if code in _DTYPES}
    return found


def without_layer(name: str) -> str:
    """The end of a layer's parameter name that is the same in every layer."""
    return name.split(".", 3)[-1] if name.startswith("model.layers.") else name
