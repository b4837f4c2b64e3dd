"""A forward pass straight from a checkpoint's files, with one layer in memory at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from gdagrow.archs import architecture_of
from gdagrow.convert import as_motif
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.header import Header
from gdagrow.models.config import GdaConfig
from gdagrow.models.layers import PROJECTIONS, GdaBlock, RmsNorm
from gdagrow.plan import claim
from gdagrow.reading import open_reader

# Elements of the head's weight, and of the logits, that are in memory at a time.
_HEAD_ELEMENTS = 2**24

Hook = Callable[[nn.Module, object, Tensor], Tensor]


class StreamedModel:
    """The reference GDA model over a checkpoint's files; each part is read when its turn comes and dropped after it.

    Args:
        header: The checkpoint; its tensors are held against the architecture's table first.
        dtype: Dtype of every weight and activation.
        device: Where the arithmetic is done.

    Raises:
        CheckpointError: the checkpoint does not fit its table, or the reference model cannot run its config.
    """

    def __init__(self, header: Header, *, dtype: torch.dtype, device: str) -> None:
        architecture = architecture_of(header.config)
        self.sizes = architecture.sizes(header.config)
        claim(header, architecture, self.sizes)
        # What else there is, the reference model runs in Motif's layout.
        header = as_motif(header)
        self._config = GdaConfig.from_dict(header.config)
        self._header, self._dtype, self._device = header, dtype, device
        self._embedding = architecture.embedding
        self._head = architecture.embedding if architecture.is_tied(header.config) else architecture.head
        self._last_norm = architecture.last_norm

    def hidden_states(self, tokens: Tensor, hook: Hook | None = None) -> Iterator[Tensor]:
        """Yield the residual stream, `[seqs, length, hidden]`: the embedding's, each layer's, the last norm's.

        Args:
            tokens: int64 `[seqs, length]`.
            hook: A forward hook on every projection and norm.
        """
        with open_reader(self._header) as reader:
            rows, places = torch.unique(tokens, return_inverse=True)
            # Only the rows that occur are read.
            embedding = reader.tensor(self._embedding)[rows]
            hidden = embedding.to(self._device, self._dtype)[places.to(self._device)]
            yield hidden
            for layer in range(self.sizes.num_layers):
                hidden = self._block(reader, layer, hook)(hidden)
                yield hidden
            norm = _loaded(
                RmsNorm, self.sizes.hidden, self._config.rms_norm_eps, state=self._state(reader, self._last_norm)
            )
            hidden = _hooked(norm, hook)(hidden)
            yield hidden

    def logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the logits of normed hidden states, `[few, hidden]` each, a block `[few, vocab]` for each of them."""
        with open_reader(self._header) as reader:
            step = max(1, _HEAD_ELEMENTS // self.sizes.hidden)
            for states in hidden:
                parts = []
                for begin in range(0, self.sizes.vocab, step):
                    rows = reader.rows(self._head, begin, min(begin + step, self.sizes.vocab))
                    parts.append(states @ rows.to(self._device, self._dtype).T)
                yield torch.cat(parts, dim=-1)

    def _block(self, reader: TensorReader, layer: int, hook: Hook | None) -> nn.Module:
        prefix = f"model.layers.{layer}."
        state = {name: value for full in self._header.tensors if full.startswith(prefix)
                 for name, value in self._state(reader, full, prefix).items()}  # fmt: skip
        bias = {name.split(".")[-2] for name in state if name.endswith(".bias")} & PROJECTIONS
        return _hooked(_loaded(GdaBlock, self._config, layer, bias, state=state), hook)

    def _state(self, reader: TensorReader, name: str, prefix: str = "") -> dict[str, Tensor]:
        short = name[len(prefix) :] if prefix else name.rpartition(".")[2]
        return {short: reader.tensor(name).to(self._device, self._dtype)}


def _loaded(kind: type[nn.Module], *arguments: object, state: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        module = kind(*arguments)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def _hooked(module: nn.Module, hook: Hook | None) -> nn.Module:
    if hook is not None:
        for part in module.modules():
            if isinstance(part, (nn.Linear, RmsNorm)):
                part.register_forward_hook(hook)
    return module
