"""Figures over two models' logits, the vocabulary in pieces: neither logits nor heads are ever whole in memory."""

import math

import torch
from torch import Tensor

from gdagrow.verify.forward import HEAD_ELEMENTS, StreamedModel

# Logits of one model that are in memory at a time, and the positions that one pass over the heads serves.
_PIECE_ELEMENTS, _BLOCK_POSITIONS = 2**22, 2**12


class LogitFigures:
    """Running figures over all positions.

    largest: The source's largest absolute logit.
    apart: The largest difference of a logit.
    disturbed: The same between the source and itself, disturbed.
    kl: Sum of the KL divergences from source to grown, nats.
    agreed: Positions where the grown model's most likely token is one of the source's.
    source_loss, grown_loss: Sums of the negative log-likelihoods of the next tokens, nats.
    num_positions, num_targets: Positions, and those of them with a next token.
    """

    def __init__(self) -> None:
        self.largest = self.apart = self.disturbed = self.kl = self.source_loss = self.grown_loss = 0.0
        self.agreed = self.num_positions = self.num_targets = 0

    def add(
        self, source: StreamedModel, grown: StreamedModel, states: tuple[Tensor, Tensor, Tensor], targets: Tensor
    ) -> None:
        """Add positions.

        Args:
            source, grown: The models, whose heads are read.
            states: Normed hidden states, `[positions, hidden]`: the source's, the grown model's, and those of the
                source disturbed.
            targets: int64 `[positions]`, the next token, or -1 where there is none.
        """
        for at in range(0, len(targets), _BLOCK_POSITIONS):
            block = [part[at : at + _BLOCK_POSITIONS] for part in states]
            self._add_block(source, grown, block, targets[at : at + _BLOCK_POSITIONS])

    def _add_block(self, source: StreamedModel, grown: StreamedModel, states: list[Tensor], targets: Tensor) -> None:
        block = _Block(targets)
        widest = max(source.sizes.hidden, grown.sizes.hidden)
        step = max(1, min(_PIECE_ELEMENTS // len(targets), HEAD_ELEMENTS // widest))
        begin = 0
        for one, other in zip(source.head_rows(step), grown.head_rows(step), strict=True):
            clean, logits, disturbed = (
                (part @ rows.T).double() for part, rows in zip(states, (one, other, one), strict=True)
            )
            self.largest = _larger(self.largest, clean.abs())
            self.disturbed = _larger(self.disturbed, (clean - disturbed).abs())
            apart = clean - logits
            block.add(begin, clean, logits, apart)
            self.apart = _larger(self.apart, apart.abs_())
            begin += len(one)
        self.kl += float(block.kl.sum())
        self.agreed += int(block.agrees.sum())
        source_loss, grown_loss = block.losses
        self.source_loss += float(source_loss.sum())
        self.grown_loss += float(grown_loss.sum())
        self.num_positions += len(targets)
        self.num_targets += int((targets >= 0).sum())


class _Block:
    """Positions whose logits come piece by piece: sums over the vocabulary relative to the largest logit so far."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        zeros = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self._top, self._other_top = zeros - math.inf, zeros - math.inf
        self._sum, self._other_sum, self._gap = zeros, zeros, zeros
        self._chosen = zeros
        self._hit, self._other_hit = zeros, zeros

    def add(self, begin: int, clean: Tensor, other: Tensor, apart: Tensor) -> None:
        """Add the logits of tokens from `begin`, float64 `[positions, few]`, and their differences."""
        best, index = other.max(-1)
        chosen = clean.gather(-1, index[:, None])[:, 0]
        self._chosen = torch.where(best > self._other_top, chosen, self._chosen)
        top, other_top = torch.maximum(self._top, clean.amax(-1)), torch.maximum(self._other_top, best)
        weights, shrunk = (clean - top[:, None]).exp_(), (self._top - top).exp()
        self._sum = self._sum * shrunk + weights.sum(-1)
        self._gap = self._gap * shrunk + (weights * apart).sum(-1)
        self._other_sum = self._other_sum * (self._other_top - other_top).exp() + (
            other - other_top[:, None]
        ).exp_().sum(-1)
        self._top, self._other_top = top, other_top
        here = (self._targets >= begin) & (self._targets < begin + clean.shape[-1])
        place = (self._targets - begin).clamp(0, clean.shape[-1] - 1)[:, None]
        self._hit = torch.where(here, clean.gather(-1, place)[:, 0], self._hit)
        self._other_hit = torch.where(here, other.gather(-1, place)[:, 0], self._other_hit)

    @property
    def kl(self) -> Tensor:
        """KL divergence of each position: `sum p (log p - log q)`, by logits and the logs of both sums."""
        gap = self._gap / self._sum
        # Rounding may take a divergence of nothing below zero.
        return (gap - self._log_sum + self._other_log_sum).clamp(min=0)

    @property
    def agrees(self) -> Tensor:
        """Whether the token that the grown model finds most likely is so, or equally so, for the source."""
        return self._chosen == self._top

    @property
    def losses(self) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood of the targets by both models."""
        known = self._targets >= 0
        return (self._log_sum - self._hit)[known], (self._other_log_sum - self._other_hit)[known]

    @property
    def _log_sum(self) -> Tensor:
        return self._top + self._sum.log()

    @property
    def _other_log_sum(self) -> Tensor:
        return self._other_top + self._other_sum.log()


def _larger(known: float, found: Tensor) -> float:
    """The larger of two; NaN if either is, which `max` would lose."""
    largest = found.max()
    return math.nan if math.isnan(known) or largest.isnan() else max(known, float(largest))
