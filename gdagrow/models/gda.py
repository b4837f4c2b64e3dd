"""A language model with grouped differential attention (GDA), in the checkpoint layout of the Motif family."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from gdagrow.errors import CheckpointError
from gdagrow.formats.safetensors_header import SINGLE_FILE, read_header
from gdagrow.formats.safetensors_reader import TORCH_DTYPES, TensorReader
from gdagrow.header import Header
from gdagrow.models.config import GdaConfig
from gdagrow.models.kernels import at_least_float32
from gdagrow.models.layers import (
    PROJECTIONS,
    GdaAttention,
    GdaBlock,
    GdaMlp,
    LayerCache,
    Projection,
    RmsNorm,
)

__all__ = [
    "GdaAttention", "GdaBlock", "GdaConfig", "GdaMlp", "GdaModel", "GdaOutput",
    "LayerCache", "init_weights", "load_model", "save_model",
]  # fmt: skip


class GdaOutput(NamedTuple):
    """`logits` `[batch, positions, vocab]` in the activations' dtype; `loss` a scalar in at least float32, or None."""

    logits: Tensor
    loss: Tensor | None


class GdaBackbone(nn.Module):
    """Embedding, blocks and final norm: what the checkpoint calls `model.`"""

    def __init__(self, config: GdaConfig, bias: Collection[str]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GdaBlock(config, index, bias) for index in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, caches: Sequence[LayerCache] | None = None) -> Tensor:
        hidden: Tensor = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, caches[index] if caches else None)
        output: Tensor = self.norm(hidden)
        return output


class GdaModel(nn.Module):
    """A causal GDA language model whose `state_dict` has exactly the names and shapes of a Motif checkpoint.

    Activations have the dtype of the embedding. Tied models have no `lm_head`.

    Args:
        config: sizes and constants.
        bias: which of the seven projections (`q_proj` ... `down_proj`) have a bias; by default all or none, as
            `config.use_bias` says.
    """

    def __init__(self, config: GdaConfig, bias: Collection[str] | None = None) -> None:
        super().__init__()
        if bias is None:
            bias = PROJECTIONS if config.use_bias else ()
        assert set(bias) <= PROJECTIONS, bias
        self.config = config
        self.model = GdaBackbone(config, bias)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, caches: Sequence[LayerCache] | None = None
    ) -> GdaOutput:
        """Logits, and the mean cross-entropy in nats of `labels`, shifted here (-100 is left out).

        Args:
            input_ids: `[batch, positions]`, integers below `vocab_size`.
            labels: the same shape, usually `input_ids` itself.
            caches: one for each layer: `input_ids` then goes on after what they hold, and is added to them.
        """
        hidden = self.model(input_ids, caches)
        logits = F.linear(hidden, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        if labels is None:
            return GdaOutput(logits, None)
        predictions = logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(predictions.to(at_least_float32(logits.dtype)), labels[:, 1:].flatten())
        return GdaOutput(logits, loss)


def init_weights(model: GdaModel, seed: int) -> None:
    """Fill `model` in place for training from scratch, the same for the same seed.

    Matrices are normal with deviation 0.02, lambda vectors with 0.1 (as in arXiv:2410.05258); norms are one, PolyNorm
    is the even mixture, biases are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lambda_" in name or parameter.dim() == 2:
                deviation = 0.1 if ".lambda_" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1 / 3 if ".act_fn." in name else 1)


def save_model(model: GdaModel, directory: str | Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` into `directory`, each tensor in the dtype that it has."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def load_model(directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> GdaModel:
    """Load a Motif checkpoint directory, tensor by tensor, so that memory never holds two copies of the model.

    Args:
        directory: has `config.json` and `model.safetensors`, or the shards of `model.safetensors.index.json`.
        dtype: cast every tensor to it; by default each keeps the dtype that it is stored in.
        device: where the tensors go.

    Raises:
        CheckpointError: a file is missing or broken, or the tensors are not those of the config; all names that are
            missing, unexpected, of another shape or not floating point are listed.
    """
    header = read_header(Path(directory))
    projections = {name.split(".")[-2] for name in header.tensors if name.endswith("_proj.bias")}
    with torch.device("meta"):
        model = GdaModel(GdaConfig.from_dict(header.config), bias=projections & PROJECTIONS)
    _check_fit(header, model)
    with TensorReader(header) as reader:
        for name in header.tensors:
            # A copy, because what the reader returns is mapped memory that changes when the file does.
            tensor = reader.tensor(name).to(device, dtype, copy=True)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    return model


def _check_fit(header: Header, model: GdaModel) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in header.tensors]
    for name, info in header.tensors.items():
        if name not in expected:
            problems.append(f"{name} is unexpected")
        elif info.shape != expected[name]:
            problems.append(f"{name} has shape {list(info.shape)}, expected {list(expected[name])}")
        elif info.dtype not in TORCH_DTYPES:
            problems.append(f"{name} is {info.dtype}, expected one of {', '.join(TORCH_DTYPES)}")
    if problems:
        raise CheckpointError(f"{header.directory}: the weights are not those of config.json: {'; '.join(problems)}")
