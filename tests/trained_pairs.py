"""A trained source and what it grew into, and optimizers for both that should take the same steps.

tests/numerics/test_training_steps.py says why they should.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gdagrow.engine import grow_moment
from gdagrow.growth import TensorGrowth
from gdagrow.models.gda import GdaModel, load_model, save_model
from gdagrow.plan import GrowthPlan
from gdagrow.states.moments import POWERS
from tests.checkpoints import write_checkpoint
from tests.growths import EPS, grow

EPSILON = torch.finfo(torch.float64).eps
RATE, DECAY, WARM_STEPS = 1e-3, 0.1, 3
# As large as many gradients here, so that a wrong eps would show; and rounding of a gradient that is zero on paper is
# not blown up to a step of full size.
ADAM_EPS = 1e-3
# Dependent roundings of a gradient, forward and backward through up to three layers of sums of up to 60 products.
ROUNDINGS = 2**10
MUON: Any = getattr(torch.optim, "Muon", None)  # since torch 2.9

BIG = {
    "dtype": torch.float64, "groups": 4, "kv_groups": 2, "ratio": 2, "head_dim": 4, "hidden": 12, "ffn": 10,
    "vocab": 23, "bias": True, "scale": 0.3, "extra": EPS,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """An optimizer, and what the table in test_training_steps.py says of it as functions of `w` and `r`.

    rate, decay: The factors of learning rate and weight decay.
    condition: How often an error of a gradient may be found in the step, as a share of the learning rate, at most.
    """

    make: Callable[..., Optimizer]
    options: Mapping[str, Any]
    rate: Callable[[float, float], float]
    decay: Callable[[float, float], float]
    condition: float

    def multiplied(self, w: float, r: float) -> dict[str, Any]:
        """The options of a group of elements with `w` written and `r` read copies."""
        options = {**self.options, "lr": RATE * self.rate(w, r)}
        factors = {"weight_decay": self.decay(w, r), "eps": 1 / w}
        return options | {key: options[key] * factor for key, factor in factors.items() if key in options}


# A momentum of 0.9 lets a gradient act in ten steps.
SGD_MOMENTUM, SGD_CONDITION = 0.9, 10.0
ADAM: Mapping[str, Any] = {"eps": ADAM_EPS, "betas": (0.9, 0.999), "weight_decay": DECAY}

METHODS = {
    "sgd": Method(SGD, {}, lambda w, r: w / r, lambda w, r: 1.0, 1.0),
    "sgd momentum decay": Method(
        SGD, {"momentum": SGD_MOMENTUM, "weight_decay": DECAY}, lambda w, r: w / r, lambda w, r: r / w, SGD_CONDITION
    ),
    "nesterov": Method(
        SGD, {"momentum": SGD_MOMENTUM, "nesterov": True}, lambda w, r: w / r, lambda w, r: 1.0, SGD_CONDITION
    ),
    # An error in `m` or in `sqrt(v)` changes `m / (sqrt(v) + eps)` by at most itself, by `eps`, each.
    "adam": Method(Adam, ADAM, lambda w, r: 1 / r, lambda w, r: r / w, 2 / ADAM_EPS),
    "adamw": Method(AdamW, ADAM, lambda w, r: 1 / r, lambda w, r: r, 2 / ADAM_EPS),
    "adamw amsgrad": Method(AdamW, {**ADAM, "amsgrad": True}, lambda w, r: 1 / r, lambda w, r: r, 2 / ADAM_EPS),
    "adam amsgrad": Method(Adam, {**ADAM, "amsgrad": True}, lambda w, r: 1 / r, lambda w, r: r / w, 2 / ADAM_EPS),
}


def batches(vocab: int, num: int, *, seed: int) -> list[Tensor]:
    """Random tokens for each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (2, 6), generator=generator) for _ in range(num)]


def backward(model: GdaModel, ids: Tensor) -> None:
    model.zero_grad()
    loss = model(ids, ids).loss
    assert loss is not None
    loss.backward()


State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Pair:
    """A source that was trained for a few steps, its optimizer's state by name, and what it grew into."""

    method: Method
    plan: GrowthPlan
    source: GdaModel
    grown: GdaModel
    state: State
    directory: Path

    @property
    def lost(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.plan.tensors if tensor.moments_lost)

    def grown_state(self) -> State:
        """The source's state, every moment grown by the engine, also those that the plan says are lost."""
        return {
            tensor.name: {
                key: grow_moment(tensor.growth, moment, POWERS[key]) if key in POWERS else moment.clone()
                for key, moment in self.state[tensor.source.name].items()
                if moment is not None
            }
            for tensor in self.plan.tensors
        }


def copies(growth: TensorGrowth, *, read: bool) -> Tensor:
    """How many copies there are of each element along the dimensions that are read, or written, counted one by one."""
    found = torch.ones(growth.shape, dtype=torch.float64)
    for dim, (index_map, reads) in enumerate(zip(growth.dims, growth.reads, strict=True)):
        if reads == read:
            times = Counter(index_map)
            shape = [-1 if d == dim else 1 for d in range(len(growth.shape))]
            found = found * torch.tensor([times[old] for old in index_map], dtype=torch.float64).reshape(shape)
    return found


def gathered(growth: TensorGrowth, source: Tensor) -> Tensor:
    """For each grown element, the source's element that it comes from."""
    for dim, index_map in enumerate(growth.dims):
        source = source.index_select(dim, torch.tensor(list(index_map)))
    return source


def grown_pair(directory: Path, topology: Mapping[str, Any], recipe: Mapping[str, Any], method: Method) -> Pair:
    """Train a random checkpoint for `WARM_STEPS`, and grow it as exact copies through real files."""
    config = write_checkpoint(directory / "source", **topology)
    source = load_model(directory / "source")
    # Muon is for matrices.
    stepped = [p for p in source.parameters() if p.dim() == 2 or method.make is not MUON]
    optimizer = method.make(stepped, lr=RATE, **method.options)
    for ids in batches(config["vocab_size"], WARM_STEPS, seed=1):
        backward(source, ids)
        optimizer.step()
    save_model(source, directory / "trained", config)
    plan = grow(directory / "trained", directory / "grown", {**recipe, "exact_copies": True}).plan
    state = {name: dict(optimizer.state.get(p, {})) for name, p in source.named_parameters()}
    return Pair(method, plan, source, load_model(directory / "grown"), state, directory)


def whole(model: GdaModel, method: Method, state: State, names: Collection[str]) -> Optimizer:
    """The method on a model's parameters of these names, in one group, with a copy of this state."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    optimizer = method.make(parameters.values(), lr=RATE, **method.options)
    for name, parameter in parameters.items():
        optimizer.state[parameter].update(copy.deepcopy(state[name]))
    return optimizer


class Piecewise:
    """The method on the grown model with the table's multipliers, elements of as many copies in a group of their own.

    Every optimizer here but Muon works element by element, so that it does not matter where a tensor is cut.
    """

    def __init__(self, pair: Pair, state: State, names: Collection[str]) -> None:
        self._parameters = dict(pair.grown.named_parameters())
        self._pieces: list[tuple[str, Tensor, nn.Parameter]] = []
        groups: list[dict[str, Any]] = []
        for tensor in pair.plan.tensors:
            if tensor.name not in names:
                continue
            written, read = copies(tensor.growth, read=False), copies(tensor.growth, read=True)
            for w, r in sorted(set(zip(written.flatten().tolist(), read.flatten().tolist(), strict=True))):
                mask = (written == w) & (read == r)
                piece = nn.Parameter(self._parameters[tensor.name].detach()[mask])
                self._pieces.append((tensor.name, mask, piece))
                groups.append({"params": [piece], **pair.method.multiplied(w, r)})
        self._optimizer = pair.method.make(groups)
        for name, mask, piece in self._pieces:
            of_piece = {key: value if value.dim() == 0 else value[mask] for key, value in state[name].items()}
            self._optimizer.state[piece].update(copy.deepcopy(of_piece))

    def step(self) -> None:
        for name, mask, piece in self._pieces:
            gradient = self._parameters[name].grad
            assert gradient is not None
            piece.grad = gradient[mask]
        self._optimizer.step()
        for name, mask, piece in self._pieces:
            self._parameters[name].data[mask] = piece.detach()


@dataclass(frozen=True)
class Gaps:
    """How far the grown run is from the source run after some steps, by grown tensor.

    weights: The largest difference between `r` times a grown weight and the source's weight that it comes from. It
        bounds how far the fold is from the source and how far the copies of one element are from each other.
    tolerance: What rounding may make of it: in each step so far an error of `ROUNDINGS` eps in a gradient, through the
        method's condition, and an eps of the weights themselves.
    """

    weights: dict[str, float]
    tolerance: float

    def beyond(self) -> set[str]:
        return {name for name, gap in self.weights.items() if not gap <= self.tolerance}


def trained_on(pair: Pair, grown: Piecewise | Optimizer, source: Optimizer, num_steps: int) -> Iterator[Gaps]:
    """Step both models on the same tokens; yields the gaps after each step."""
    largest = 0.0
    for num, ids in enumerate(batches(pair.source.config.vocab_size, num_steps, seed=2), 1):
        for model, optimizer in ((pair.source, source), (pair.grown, grown)):
            backward(model, ids)
            optimizer.step()
        gradients = (p.grad for p in pair.source.parameters())
        largest = max(largest, *(float(g.abs().max()) for g in gradients if g is not None))
        of_source = max(float(p.detach().abs().max()) for p in pair.source.parameters())
        rounding = ROUNDINGS * RATE * pair.method.condition * largest + 2 * of_source
        yield Gaps({name: float(gap.abs().max()) for name, gap in gaps(pair).items()}, num * EPSILON * rounding)


def gaps(pair: Pair) -> dict[str, Tensor]:
    """`r` times each grown weight, minus the source's weight that it comes from."""
    source, grown = dict(pair.source.named_parameters()), dict(pair.grown.named_parameters())
    return {
        t.name: (copies(t.growth, read=True) * grown[t.name] - gathered(t.growth, source[t.source.name])).detach()
        for t in pair.plan.tensors
    }


def trainable(pair: Pair) -> tuple[set[str], set[str]]:
    """The source's and the grown model's parameters whose moments the growth carries; the others are not trained."""
    excluded = {tensor.source.name for tensor in pair.plan.tensors if tensor.moments_lost}
    kept = [tensor for tensor in pair.plan.tensors if tensor.source.name not in excluded]
    return {tensor.source.name for tensor in kept}, {tensor.name for tensor in kept}


def every(pair: Pair) -> tuple[set[str], set[str]]:
    return {tensor.source.name for tensor in pair.plan.tensors}, {tensor.name for tensor in pair.plan.tensors}


def moved(model: GdaModel, optimizer: Optimizer | Piecewise) -> dict[str, Tensor]:
    """How far one step moves each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, batches(model.config.vocab_size, 1, seed=2)[0])
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}
