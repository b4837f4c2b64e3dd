"""A forward pass straight from a checkpoint's files, with one half of a layer in memory at a time."""

from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from gdagrow.archs import architecture_of
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.header import Header
from gdagrow.models.config import GdaConfig
from gdagrow.models.layers import PROJECTIONS, GdaAttention, GdaMlp, LayerCache, RmsNorm
from gdagrow.plan import claim

# Elements of a head's weight to read at a time.
HEAD_ELEMENTS = 2**24

Inner = TypeVar("Inner", GdaAttention, GdaMlp)
Hook = Callable[[nn.Module, object, Tensor], Tensor]


class Branch(nn.Module, Generic[Inner]):
    """One half of a layer: a norm, and the attention or MLP whose output is added to the residual stream.

    names: The checkpoint's name of every parameter, by its name here.
    """

    norm: RmsNorm
    inner: Inner

    def __init__(self, norm: RmsNorm, inner: Inner, names: dict[str, str]) -> None:
        super().__init__()
        self.norm, self.inner, self.names = norm, inner, names

    def forward(self, hidden: Tensor, cache: LayerCache | None = None) -> Tensor:
        normed = self.norm(hidden)
        output: Tensor = self.inner(normed) if cache is None else self.inner(normed, cache)
        return hidden + output


class StreamedModel:
    """The reference GDA model over a checkpoint's files; each half of a layer is read when its turn comes.

    A context manager, which holds the files open. All halves are read into the same memory: one is no longer what it
    was once the next is asked for.

    Args:
        header: The checkpoint; its tensors are held against the architecture's table first.
        dtype: Dtype of every weight and activation.
        device: Where the arithmetic is done.
        hook: A forward hook on every projection and norm.

    Raises:
        CheckpointError: the checkpoint does not fit its table, or the reference model cannot run its config.
    """

    def __init__(self, header: Header, *, dtype: torch.dtype, device: str, hook: Hook | None = None) -> None:
        architecture = architecture_of(header.config)
        self.sizes = architecture.sizes(header.config)
        claim(header, architecture, self.sizes)
        self.config = GdaConfig.from_dict(header.config)
        self.is_tied = architecture.is_tied(header.config)
        self.embedding_name, self.last_norm_name = architecture.embedding, architecture.last_norm
        self.head_name = architecture.embedding if self.is_tied else architecture.head
        self._header, self._dtype, self._device, self._hook = header, dtype, device, hook
        self._reader = TensorReader(header)
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first layer, `[seqs, length, hidden]`, of int64 `[seqs, length]`."""
        rows, places = torch.unique(tokens, return_inverse=True)
        # Only the rows that occur are read.
        embedding = self._reader.tensor(self.embedding_name)[rows]
        return embedding.to(self._device, self._dtype)[places.to(self._device)]

    def attention(self, layer: int) -> Branch[GdaAttention]:
        """The attention of a layer and the norm before it."""
        bias = self._biases(prefix := f"model.layers.{layer}.self_attn.")
        with torch.device("meta"):
            inner = GdaAttention(self.config, layer, bias)
        return self._branch(f"model.layers.{layer}.input_layernorm.", prefix, inner)

    def mlp(self, layer: int) -> Branch[GdaMlp]:
        """The MLP of a layer and the norm before it."""
        bias = self._biases(prefix := f"model.layers.{layer}.mlp.")
        with torch.device("meta"):
            inner = GdaMlp(self.config, bias)
        return self._branch(f"model.layers.{layer}.post_attention_layernorm.", prefix, inner)

    def half(self, index: int) -> Branch[GdaAttention] | Branch[GdaMlp] | None:
        """Half `index` of the model's layers, counted through: attention, MLP, attention, ...; None after the last."""
        layer, is_mlp = divmod(index, 2)
        if layer >= self.sizes.num_layers:
            return None
        return self.mlp(layer) if is_mlp else self.attention(layer)

    def last_norm(self) -> RmsNorm:
        """The norm before the head."""
        with torch.device("meta"):
            norm = RmsNorm(self.sizes.hidden, self.config.rms_norm_eps)
        norm.load_state_dict(self._weights({"weight": self.last_norm_name}), assign=True)
        self._prepare(norm)
        return norm

    def head_rows(self, step: int) -> Iterator[Tensor]:
        """The head's weight, `[step, hidden]` at a time."""
        for begin in range(0, self.sizes.vocab, step):
            rows = self._reader.rows(self.head_name, begin, min(begin + step, self.sizes.vocab))
            yield rows.to(self._device, self._dtype)

    def _biases(self, prefix: str) -> Collection[str]:
        return {name for name in PROJECTIONS if f"{prefix}{name}.bias" in self._header.tensors}

    def _branch(self, norm_prefix: str, prefix: str, inner: Inner) -> Branch[Inner]:
        with torch.device("meta"):
            branch = Branch(RmsNorm(self.sizes.hidden, self.config.rms_norm_eps), inner, {})
        branch.names = {
            local: (norm_prefix if local.startswith("norm.") else prefix) + local.partition(".")[2]
            for local, _ in branch.named_parameters()
        }
        branch.load_state_dict(self._weights(branch.names), assign=True)
        self._prepare(branch)
        return branch

    def _weights(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Stored tensors by their local names, cast, in memory used before: fresh pages take longer than the casts."""
        stored = {local: self._reader.tensor(name) for local, name in names.items()}
        num_elements = sum(weight.numel() for weight in stored.values())
        if len(self._memory) < num_elements:
            self._memory = self._memory.new_empty(0)
            self._memory = self._memory.new_empty(num_elements)
        places = torch.split(self._memory[:num_elements], [weight.numel() for weight in stored.values()])
        return {
            local: place.view(weight.shape).copy_(weight)
            for (local, weight), place in zip(stored.items(), places, strict=True)
        }

    def _prepare(self, module: nn.Module) -> None:
        module.requires_grad_(False)
        if self._hook is not None:
            for part in module.modules():
                if isinstance(part, (nn.Linear, RmsNorm)):
                    part.register_forward_hook(self._hook)
