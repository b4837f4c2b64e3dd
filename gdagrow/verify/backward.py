"""A backward pass straight from a checkpoint's files, half a layer and its gradients in memory at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gdagrow.models.kernels import at_least_float32
from gdagrow.verify.forward import HEAD_ELEMENTS, StreamedModel

Gradients = dict[str, Tensor]  # by the checkpoint's names


class BackwardPass:
    """The gradients of the mean cross-entropy of next tokens.

    It holds the residual stream before every layer, and no weights; each layer is run again when its turn comes.

    Args:
        model: The model.
        tokens: int64 `[seqs, length]` with at least two tokens each.
        settle: What becomes of the residual stream after each half of a layer, such as a disturbance.
    """

    def __init__(
        self, model: StreamedModel, tokens: Tensor, settle: Callable[[Tensor], Tensor] = lambda states: states
    ) -> None:
        self._model, self._tokens, self._settle = model, tokens, settle
        self._inputs: list[Tensor] = []
        with torch.no_grad():
            hidden = model.embed(tokens)
            for layer in range(model.sizes.num_layers):
                self._inputs.append(hidden)
                hidden = settle(model.attention(layer)(hidden))
                hidden = settle(model.mlp(layer)(hidden))
            self._last = hidden
            self._normed = model.last_norm()(hidden)[:, :-1].flatten(0, 1)
            self._targets = tokens[:, 1:].flatten().to(hidden.device)
            self._log_sums = self._log_sums_of_logits()
        self._embedding_gradient: Tensor | None = None

    @property
    def loss(self) -> float:
        """The mean cross-entropy, nats."""
        hits = torch.zeros_like(self._log_sums)
        begin = 0
        for rows in self._rows():
            here = ((self._targets >= begin) & (self._targets < begin + len(rows))).nonzero()[:, 0]
            hits[here] = self._logits(rows)[here, self._targets[here] - begin]
            begin += len(rows)
        return float((self._log_sums - hits).mean())

    def layers(self) -> Iterator[Gradients]:
        """Yield the gradients of the last norm, then of each half of a layer, the last first."""
        model = self._model
        of_normed = torch.zeros_like(self._last)
        of_normed[:, :-1] = self._gradient_of_normed().view(len(of_normed), -1, of_normed.shape[-1])
        norm = model.last_norm().requires_grad_()
        with torch.enable_grad():
            last = self._last.detach().requires_grad_()
            onward, of_norm = torch.autograd.grad(norm(last), [last, norm.weight], of_normed)
        yield {model.last_norm_name: of_norm}
        for layer in reversed(range(model.sizes.num_layers)):
            start = self._inputs.pop()
            with torch.no_grad():
                middle = self._settle(model.attention(layer)(start))
            for half, states in ((model.mlp, middle), (model.attention, start)):
                branch = half(layer).requires_grad_()
                names, weights = zip(*((branch.names[n], p) for n, p in branch.named_parameters()), strict=True)
                with torch.enable_grad():
                    states = states.detach().requires_grad_()
                    output = self._settle(branch(states))
                onward, *found = torch.autograd.grad(output, [states, *weights], onward)
                yield dict(zip(names, found, strict=True))
        self._embedding_gradient = onward.flatten(0, 1)

    def vocabulary(self, step: int) -> Iterator[tuple[int, Gradients]]:
        """Yield the first token and the gradients of `step` rows of embedding and head; all layers must be done."""
        assert self._embedding_gradient is not None, "layers() has not come to its end"
        model, tokens = self._model, self._tokens.flatten().to(self._last.device)
        begin = 0
        for rows in model.head_rows(step):
            of_head = self._gradient_of_logits(begin, rows).T @ self._normed
            of_embedding = torch.zeros_like(rows)
            here = (tokens >= begin) & (tokens < begin + len(rows))
            of_embedding.index_add_(0, tokens[here] - begin, self._embedding_gradient[here])
            if model.is_tied:
                yield begin, {model.embedding_name: of_embedding + of_head}
            else:
                yield begin, {model.embedding_name: of_embedding, model.head_name: of_head}
            begin += len(rows)

    def _rows(self) -> Iterator[Tensor]:
        return self._model.head_rows(max(1, HEAD_ELEMENTS // self._model.sizes.hidden))

    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._normed @ rows.T
        return logits.to(at_least_float32(logits.dtype))

    def _log_sums_of_logits(self) -> Tensor:
        sums = [self._logits(rows).logsumexp(-1) for rows in self._rows()]
        total: Tensor = torch.stack(sums).logsumexp(0)
        return total

    def _gradient_of_logits(self, begin: int, rows: Tensor) -> Tensor:
        """`[positions, few]`, of the tokens from `begin`: probabilities less the targets, over their number."""
        gradient = (self._logits(rows) - self._log_sums[:, None]).exp_()
        here = ((self._targets >= begin) & (self._targets < begin + len(rows))).nonzero()[:, 0]
        gradient[here, self._targets[here] - begin] -= 1
        return (gradient / len(self._targets)).to(rows.dtype)

    def _gradient_of_normed(self) -> Tensor:
        total, begin = torch.zeros_like(self._normed), 0
        for rows in self._rows():
            total += self._gradient_of_logits(begin, rows) @ rows
            begin += len(rows)
        return total
