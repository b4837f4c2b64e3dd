"""What rounding alone may do to a result: a budget from the dtype, the lengths of sums and a measured condition."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from gdagrow.models.kernels import at_least_float32

# By Higham and Mary (2019) a sum of n terms errs by more than `8 * sqrt(n)` roundings with probability 3e-14.
_CERTAINTY = 8.0
# Element by element, between one projection and the next, forward and backward: RoPE, softmax, the difference and its
# norm, PolyNorm's powers. Long sums make little of them; in a model a few features wide they are most of all roundings.
_ELEMENTWISE = 32


def rounding_budget(dtype: torch.dtype, longest_sum: int, condition: float, *, rounds_weights: bool = False) -> float:
    """The relative difference that rounding alone may cause between two ways to compute the same.

    Every projection and norm errs by one rounding of its result in `dtype`, and by `sqrt(n)` roundings of the
    accumulator for sums of `n` terms and what is computed between them; weights that are stored with more bits than
    `dtype` has are rounded once more, parts and whole differently. The measured `condition` says how much of that
    reaches the result.
    """
    stored, accumulated = torch.finfo(dtype).eps / 2, torch.finfo(at_least_float32(dtype)).eps / 2
    return _CERTAINTY * condition * (stored * (1 + rounds_weights) + sqrt(longest_sum + _ELEMENTWISE) * accumulated)


class Disturbance:
    """Disturbs the sequences after the first `num_clean` of a batch, by `size` relative to each position's own scale.

    As a forward hook of every projection and norm it measures their condition: `condition_of` is how much of the
    disturbance reached a result.
    """

    def __init__(self, num_clean: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.num_clean = num_clean
        self._generator = torch.Generator().manual_seed(seed)
        self._size = sqrt(torch.finfo(dtype).eps)  # far above rounding, far below where the model bends

    def __call__(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        return self.disturb(output)

    def disturb(self, states: Tensor) -> Tensor:
        """The batch `[seqs, ..., width]` with its last sequences disturbed: in place, unless that is all of them."""
        if not self.num_clean:
            return torch.stack([sequence + self._noise_of(sequence) for sequence in states])
        for sequence in states[self.num_clean :]:
            sequence.add_(self._noise_of(sequence))
        return states

    def _noise_of(self, sequence: Tensor) -> Tensor:
        noise = torch.randn(sequence.shape, generator=self._generator, dtype=torch.float32).to(sequence)
        return noise.mul_(sequence.detach().square().mean(-1, keepdim=True).sqrt_().mul_(self._size))

    def condition_of(self, moved: float, scale: float) -> float:
        """The condition of a result of size `scale` that the disturbance moved by at most `moved`."""
        return moved / scale / self._size


@dataclass(frozen=True)
class Budget:
    """Tolerances of one run's results: the arguments of `rounding_budget`, with conditions measured by `noise`."""

    noise: Disturbance
    dtype: torch.dtype
    longest_sum: int
    rounds_weights: bool

    def tolerance(self, moved: float, scale: float) -> float:
        """What rounding may do to a result of size `scale`, relative to it, that the disturbance moved by `moved`."""
        condition = self.noise.condition_of(moved, scale)
        return rounding_budget(self.dtype, self.longest_sum, condition, rounds_weights=self.rounds_weights)
