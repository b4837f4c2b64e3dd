"""The dtypes of tensors in torch's files, by their safetensors codes."""

from collections.abc import Mapping
from typing import Final

import torch

from gdagrow.formats.dcp_metadata import DTYPE_CODES

DTYPES: Final[Mapping[str, torch.dtype]] = {code: getattr(torch, name) for name, code in DTYPE_CODES.items()}
