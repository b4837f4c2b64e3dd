"""A forward pass straight from a checkpoint's files, with one half of a layer in memory at a time."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gdagrow.archs import architecture_of
from gdagrow.header import Header
from gdagrow.lambda_init import lambda_init
from gdagrow.models.config import GdaConfig
from gdagrow.models.layers import PROJECTIONS, GdaAttention, GdaMlp, LayerCache, RmsNorm
from gdagrow.reading import open_reader
from gdagrow.rows import claim
from gdagrow.views import View
from gdagrow.views.convert import INDEX_SHIFT, as_motif

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

    A context manager, which holds the files open. All weights are read into the same memory: what was read is no
    longer what it was once the next is asked for.

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
        # What else there is, the reference model runs in Motif's layout.
        header = as_motif(header)
        self.config = GdaConfig.from_dict(header.config)
        self.is_tied = architecture.is_tied(header.config)
        self.embedding_name, self.last_norm_name = architecture.embedding, architecture.last_norm
        self.head_name = architecture.embedding if self.is_tied else architecture.head
        self._header, self._dtype, self._device, self._hook = header, dtype, device, hook
        self._reader = open_reader(header)
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def lambda_init(self, layer: int) -> float:
        """A layer's lambda_init as the stored model counts its layers, which a view computes otherwise."""
        return lambda_init(layer + INDEX_SHIFT if isinstance(self._header, View) else layer)

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

    def half(self, layer: int, *, is_mlp: bool) -> Branch[GdaAttention] | Branch[GdaMlp]:
        """One half of a layer: its attention, or its MLP."""
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
            (rows,) = self._cast([self._reader.rows(self.head_name, begin, min(begin + step, self.sizes.vocab))])
            yield rows

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
        """Stored tensors by their local names, cast."""
        stored = [self._reader.tensor(name) for name in names.values()]
        return dict(zip(names, self._cast(stored), strict=True))

    def _cast(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in the model's dtype, in memory used before: fresh pages take longer than the casts."""
        sizes = [weight.numel() for weight in stored]
        if len(self._memory) < sum(sizes):
            self._memory = self._memory.new_empty(0)
            self._memory = self._memory.new_empty(sum(sizes))
        places = torch.split(self._memory[: sum(sizes)], sizes)
        return [place.view(weight.shape).copy_(weight) for weight, place in zip(stored, places, strict=True)]

    def _prepare(self, module: nn.Module) -> None:
        module.requires_grad_(False)
        if self._hook is not None:
            for part in module.modules():
                if isinstance(part, (nn.Linear, RmsNorm)):
                    part.register_forward_hook(self._hook)
