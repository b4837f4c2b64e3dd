"""How a grown model fares in training: how far copies have parted, lambdas, gradients of the noise path, the loss.

Everything is read from the live model, from samples of its weights and gradients: cheap enough for every few dozen
steps of a large one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import torch
from torch import Tensor, nn

from gdagrow.archs import Parameter, architecture_of
from gdagrow.coordinates import coordinates
from gdagrow.lambda_init import lambda_init
from gdagrow.train.copies import SAMPLED_WEIGHTS, CopyFigures, CopyMeter, spread
from gdagrow.train.parameters import full, row_of
from gdagrow.verify.ancestry import whole_ancestry
from gdagrow.views.convert import INDEX_SHIFT

# Losses that make up the running mean: as many as give its spread to a tenth.
LOSS_WINDOW: Final = 50
FEWEST_LOSSES: Final = 10


@dataclass(frozen=True)
class LossFigures:
    """A loss, and the mean and standard deviation of those that it is held against."""

    loss: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class HealthFigures:
    """What `HealthMeter.measure` found.

    step: The optimizer steps taken.
    since_growth: Those taken since the growth, or None if the model was not grown.
    copies: Figures of matrices that have copies; those with weights that are not finite are left out.
    lambdas: Lambda by layer.
    noise_queries, noise_keys: By layer, the root mean square of the gradients of the noise heads' rows, relative to
        that of the signal heads' rows; without the layers that have no gradient.
    loss: The last loss, if it was given.
    """

    step: int
    since_growth: int | None
    copies: tuple[CopyFigures, ...]
    lambdas: Mapping[int, float]
    noise_queries: Mapping[int, float]
    noise_keys: Mapping[int, float]
    loss: LossFigures | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def loss_figures(losses: Sequence[tuple[int, float]], *, grown_at: int | None = None) -> LossFigures | None:
    """Hold the last loss against those before it, or, after a growth, against the last ones before that.

    Args:
        losses: `(step, loss)` as logged, in order; the last few dozen are enough.
        grown_at: The step of the last growth of which the losses tell before and after.

    Returns:
        None while there are too few losses to tell.
    """
    *earlier, (_, loss) = losses or [(0, 0.0)]
    before = [value for step, value in earlier if grown_at is None or step <= grown_at]
    known = [value for value in (before if len(before) >= FEWEST_LOSSES else []) if isfinite(value)][-LOSS_WINDOW:]
    if len(known) < FEWEST_LOSSES:
        return None
    return LossFigures(loss, fmean(known), stdev(known))


class HealthMeter:
    """Takes the figures of a model, by its architecture's table and the lineage in `growth.json`."""

    def __init__(self, config: Mapping[str, Any], record: Path | None = None) -> None:
        """Args:
            config: The content of the model's `config.json`.
            record: Its `growth.json`, or None if it was not grown.

        Raises:
            CheckpointError: no table covers the config, or the record is not of such a model.
        """
        architecture = architecture_of(config)
        self._sizes = architecture.sizes(config)
        self._table = {parameter.name: parameter for parameter in architecture.table(config)}
        self._first_index = 0 if architecture.name == "motif" else INDEX_SHIFT
        # Of the rows of queries and keys, which are of noise heads.
        self._noise_rows = {
            row: self._noise_heads(parameter).repeat_interleave(self._sizes.head_dim)
            for row, parameter in self._table.items()
            if row.endswith(("q_proj.weight", "k_proj.weight"))
        }
        self._copies = None if record is None else CopyMeter(self._table, whole_ancestry(record, self._sizes))

    @torch.no_grad()
    def measure(
        self, model: nn.Module, *, step: int, since_growth: int | None = None, loss: LossFigures | None = None
    ) -> HealthFigures:
        """Take the figures; call it between backward and the optimizer's step, where the gradients are.

        A sharded model is gathered one matrix at a time, for which all processes have to call this.

        Args:
            model: Has the layout's parameter names; it may be wrapped, and other parameters are looked over.
            step, since_growth, loss: What `HealthFigures` says; the loss from `loss_figures`.
        """
        copies: list[CopyFigures] = []
        vectors: dict[int, dict[str, Tensor]] = {}
        shares: dict[str, dict[int, float]] = {"q_proj": {}, "k_proj": {}}
        for name, parameter in model.named_parameters():
            row, layer = row_of(name, self._table) or ("", None)
            leaf = row.removesuffix(".weight").rpartition(".")[2]
            if self._copies and row and self._copies.has_copies(row, layer):
                copies += self._copies.measure(row, layer, full(parameter.detach()))
            if layer is not None and leaf.startswith("lambda_"):
                vectors.setdefault(layer, {})[leaf] = full(parameter.detach()).double()
            if layer is not None and row in self._noise_rows and parameter.grad is not None:
                share = _noise_share(self._noise_rows[row], full(parameter.grad))
                shares[leaf] |= {} if share is None else {layer: share}
        lambdas = {layer: self._lambda(layer, of_layer) for layer, of_layer in sorted(vectors.items())}
        return HealthFigures(step, since_growth, tuple(copies), lambdas, shares["q_proj"], shares["k_proj"], loss)

    def _lambda(self, layer: int, vectors: Mapping[str, Tensor]) -> float:
        first, second = (float((vectors[f"lambda_q{i}"] * vectors[f"lambda_k{i}"]).sum().exp()) for i in (1, 2))
        return first - second + lambda_init(layer + self._first_index)

    def _noise_heads(self, parameter: Parameter) -> Tensor:
        """For each head of the rows of `q_proj` or `k_proj`, whether it is a noise head."""
        expression, sizes = parameter.parsed.dims[0], self._sizes.axes
        heads = range(prod(parameter.parsed.shape(sizes)[:1]) // self._sizes.head_dim)
        places = [dict(coordinates(expression, sizes, head * self._sizes.head_dim)) for head in heads]
        # A query head is a signal head if it has a place on that axis; of a KV group the second key is the noise key.
        return torch.tensor([place["2"] == 1 if "kv" in place else "signal" not in place for place in places])


def _noise_share(is_noise: Tensor, gradient: Tensor) -> float | None:
    """The root mean square of a gradient's noise rows relative to its signal rows; None if those are zero."""
    sampled = gradient.index_select(1, spread(gradient.shape[1], SAMPLED_WEIGHTS).to(gradient.device)).double()
    squares = sampled.square().mean(1).cpu()
    signal, noise = float(squares[~is_noise].mean()), float(squares[is_noise].mean())
    return sqrt(noise / signal) if signal else None


# Copies that got noise have other gradients from the first step on, but bfloat16 may lose the first updates whole.
SAME_FOR_STEPS: Final = 20
# They part slowly: those of a demo model grown with the default noise had a mean cosine of 0.99998 after 100 steps. So
# what is asked of those that are still as alike is only that they are further apart than so many steps ago.
ALIKE_COSINE: Final = 0.9999
PARTING_STEPS: Final = 100
# lambda_init is below 0.8, and from 2 on a head is more the negative of its noise map than its signal map. The demo
# model's lambdas moved by 0.36 at most from their initialisation to step 400.
LARGEST_LAMBDA: Final = 2.0
LARGEST_DRIFT: Final = 1.0
# The demo model's were 0.02 at least (untrained, in the layer where lambda starts at 0.025), and 0.09 when trained.
SMALLEST_NOISE_SHARE: Final = 1e-3
# Moments that were lost cost 2 to 3% of the loss for five steps in our pilot. Single batches of few tokens differ by as
# much or more, hence the deviations.
SPIKE_STEPS: Final = 50
SPIKE_SHARE: Final = 0.05
SPIKE_SHARE_DEVIATIONS: Final = 3.0
SPIKE_DEVIATIONS: Final = 5.0


def warnings(figures: HealthFigures, history: Sequence[HealthFigures] = ()) -> list[str]:
    """The signatures of failure that figures show, a sentence each; none for a model that fares well.

    Args:
        figures: The last ones.
        history: Those before them since the growth, in order; the first is what lambdas are held against.
    """
    return [*_unparted(figures, history), *_lambdas(figures, history), *_noise_path(figures), *_spike(figures)]


def _unparted(figures: HealthFigures, history: Sequence[HealthFigures]) -> Iterator[str]:
    since = figures.since_growth or 0
    same = [copies for copies in figures.copies if copies.relative_distance == 0]
    if same and since >= SAME_FOR_STEPS:
        yield (
            f"copies along {_axes(same)} are bit for bit the same {since} steps after the growth ({_matrices(same)}): "
            "exact copies see identical gradients and never part; grow again with noise (without exact copies)"
        )
    long_ago = [earlier for earlier in history if earlier.step <= figures.step - PARTING_STEPS]
    if not long_ago:
        return
    then = {(c.layer, c.parameter, c.axis): c.relative_distance for c in long_ago[-1].copies}
    stuck = [
        c
        for c in figures.copies
        if c.written and c.cosine > ALIKE_COSINE
        and 0 < c.relative_distance <= then.get((c.layer, c.parameter, c.axis), 0.0)
    ]  # fmt: skip
    if stuck:
        yield (
            f"copies along {_axes(stuck)} do not part any further {since} steps after the growth ({_matrices(stuck)}, "
            f"cosine above {ALIKE_COSINE}): raise the learning rate, or grow again with more noise (a smaller snr_db)"
        )


def _lambdas(figures: HealthFigures, history: Sequence[HealthFigures]) -> Iterator[str]:
    first = history[0].lambdas if history else {}
    away = {
        layer: value
        for layer, value in figures.lambdas.items()
        if not (abs(value) <= LARGEST_LAMBDA and abs(value - first.get(layer, value)) <= LARGEST_DRIFT)
    }
    if away:
        told = ", ".join(
            f"{value:.2f} in layer {layer}" + (f" (from {first[layer]:.2f})" if layer in first else "")
            for layer, value in away.items()
        )
        yield (
            f"lambda is running away: {told}; expected within {LARGEST_LAMBDA:g} of 0 and {LARGEST_DRIFT:g} of where "
            "it was; lower the learning rate of the lambdas, and leave them out of weight decay"
        )


def _noise_path(figures: HealthFigures) -> Iterator[str]:
    for what, shares in (("queries", figures.noise_queries), ("keys", figures.noise_keys)):
        starved = [layer for layer, share in shares.items() if not share >= SMALLEST_NOISE_SHARE]
        if starved:
            yield (
                f"the noise {what} of {_layers(starved)} have gradients below "
                f"{SMALLEST_NOISE_SHARE:g} of the signal {what}': the noise path does not learn; see whether lambda is "
                "near 0 there, or the noise heads are cut off from the loss"
            )


def _spike(figures: HealthFigures) -> Iterator[str]:
    loss = figures.loss
    if loss is None:
        return
    deviations = (loss.loss - loss.mean) / loss.deviation if loss.deviation else 0.0
    is_recent = figures.since_growth is not None and figures.since_growth <= SPIKE_STEPS
    by_share = is_recent and loss.loss > loss.mean * (1 + SPIKE_SHARE) and deviations > SPIKE_SHARE_DEVIATIONS
    if not isfinite(loss.loss) or by_share or deviations > SPIKE_DEVIATIONS:
        when = f" {figures.since_growth} steps after the growth" if is_recent else ""
        yield (
            f"the loss spiked{when}: {loss.loss:.3f} at step {figures.step}, where it was {loss.mean:.3f} on average "
            f"with a deviation of {loss.deviation:.3f}; lower the learning rate, or warm it up again after the growth"
        )


def _axes(copies: Sequence[CopyFigures]) -> str:
    return ", ".join(dict.fromkeys(c.axis for c in copies))


def _matrices(copies: Sequence[CopyFigures]) -> str:
    leaves = dict.fromkeys(c.parameter.removesuffix(".weight").rpartition(".")[2] for c in copies)
    layers = sorted({c.layer for c in copies if c.layer is not None})
    return ", ".join(leaves) + (f" of {_layers(layers)}" if layers else "")


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
