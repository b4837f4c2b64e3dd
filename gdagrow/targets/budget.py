"""Growths to compare at a budget of parameters: uniform growth, and group-differentiated growth that is its equal.

Both are the nearest of all that are considered: nearest means the least factor between the two numbers, of equals the
one that adds the fewest layers, and of those again the one with the smallest factors. Considered are whole factors up
to `LARGEST_FACTOR` and up to as many new layers as the source has:

- *uniform*: one factor on all five width axes (HyperCloning);
- *group-differentiated*: signal heads are cloned more often than noise heads, up to the largest ratio that the paper
  found to train well; the factors of the other axes are free, but for those of hidden and FFN, of which neither is more
  than `LARGEST_SKEW` times the other: an arm that is equal by its FFN alone would say nothing about heads.

Embeddings stay as they are, tied or not.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from gdagrow.archs import Parameter, Sizes, architecture_of
from gdagrow.costs import ModelFigures, sized_figures
from gdagrow.errors import PlanError, RecipeError
from gdagrow.header import Header
from gdagrow.heads import LARGEST_SUPPORTED_RATIO, Heads
from gdagrow.recipe import WIDTH_AXES, Recipe, make_recipe
from gdagrow.rows import claim
from gdagrow.units import count_text
from gdagrow.views.convert import as_motif

LARGEST_FACTOR: Final = 8
LARGEST_SKEW: Final = 2

# The arms that are held against the budget itself, not against the uniform one.
NEAREST_TO_BUDGET: Final = ("uniform", "differentiated")

# What of a model is to be equal.
Measure = Callable[[ModelFigures], int]
_PARAMETERS: Final[Measure] = attrgetter("num_parameters")
_FLOPS: Final[Measure] = attrgetter("flops_per_token")


@dataclass(frozen=True)
class Arm:
    """A growth and the model that it makes; the source is one without a recipe."""

    recipe: Recipe | None
    model: ModelFigures


@dataclass(frozen=True)
class Comparison:
    """Growths of one source that can be compared fairly.

    budget: Parameters asked for.
    arms: What each shares with the others, to the growth: `source`, `uniform` and `differentiated` (each the
        nearest to the budget), and those group-differentiated growths that are nearest to the uniform one in parameters
        (`equal parameters`), in FLOPs a token (`equal FLOPs`), and in parameters among those with as many query heads
        (`equal query heads`).
    missing: Why there is no such growth, for those that there is none of.
    """

    budget: int
    arms: Mapping[str, Arm]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class _Widths:
    """Factors of the five width axes, in the order of `WIDTH_AXES`, and the model at these widths.

    model: At the source's depth.
    deeper: With one layer more; all that is counted grows by the same again with each further layer.
    """

    factors: tuple[int, ...]
    model: ModelFigures
    deeper: ModelFigures


def parse_budget(text: str) -> int:
    """Read a number of parameters such as `7B`, `700M` or a plain one.

    Raises:
        RecipeError: it is not one, or is less than 1.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    budget = 0
    if found:
        number, unit = found.groups()
        budget = round(float(number) * 1000 ** ("KMBT".index(unit.upper()) + 1 if unit else 0))
    if budget < 1:
        raise RecipeError(f"--budget: expected a number of parameters such as 7B, 700M or 1300000, got {text!r}")
    return budget


def compare_arms(header: Header, budget: int) -> Comparison:
    """Find the growths of a checkpoint to compare at a budget of parameters.

    Args:
        header: The source. A layout that has one ratio alone is seen in Motif's (`gdagrow.views.convert`).
        budget: Parameters.

    Raises:
        CheckpointError: no table covers the source, or its tensors do not fit the table.
        PlanError: the source has as many parameters already.
    """
    search = _Search(header)
    source = search.model(search.sizes)
    if budget <= source.num_parameters:
        raise PlanError(
            f"budget {count_text(budget)}: the source has {count_text(source.num_parameters)} parameters and growth "
            "never shrinks it; choose more"
        )
    uniform = search.nearest(search.uniform(), _PARAMETERS, budget)
    assert uniform is not None, "there is a uniform growth of every model"
    arms, missing = {"source": Arm(None, source), "uniform": uniform}, {}
    differentiated = list(search.differentiated())
    heads = uniform.model.sizes.heads.num_query_heads
    wanted: dict[str, tuple[list[_Widths], Measure, int, str]] = {
        "differentiated": (differentiated, _PARAMETERS, budget, search.why_none),
        "equal parameters": (differentiated, _PARAMETERS, _PARAMETERS(uniform.model), search.why_none),
        "equal FLOPs": (differentiated, _FLOPS, _FLOPS(uniform.model), search.why_none),
        "equal query heads": (
            [widths for widths in differentiated if widths.model.sizes.heads.num_query_heads == heads],
            _PARAMETERS, _PARAMETERS(uniform.model),
            f"no ratio above the source's up to {LARGEST_SUPPORTED_RATIO}:1 makes {heads} query heads",
        ),
    }  # fmt: skip
    for name, (considered, measure, target, why_none) in wanted.items():
        arm = search.nearest(considered, measure, target)
        if arm is None:
            missing[name] = why_none
        else:
            arms[name] = arm
    return Comparison(budget, arms, missing)


class _Search:
    """The growths of one source."""

    def __init__(self, header: Header) -> None:
        architecture = architecture_of(header.config)
        # A layout with one ratio has no group-differentiated growth.
        self._converts = architecture.only_ratio is not None
        if self._converts:
            claim(header, architecture, architecture.sizes(header.config))
            header = as_motif(header)
            architecture = architecture_of(header.config)
        self.sizes = architecture.sizes(header.config)
        self._tied = architecture.is_tied(header.config)
        self._rows: dict[Parameter, str] = {}
        for name, row in claim(header, architecture, self.sizes).items():
            self._rows.setdefault(row, header.tensors[name].dtype)

    @property
    def why_none(self) -> str:
        """Why there is no group-differentiated growth, if there is none."""
        return f"no ratio above the source's {self.sizes.heads.ratio}:1 is within {LARGEST_SUPPORTED_RATIO}:1"

    def model(self, sizes: Sizes) -> ModelFigures:
        return sized_figures(self._rows, sizes, tied=self._tied)

    def uniform(self) -> Iterator[_Widths]:
        for factor in range(1, LARGEST_FACTOR + 1):
            yield self._widths((factor,) * len(WIDTH_AXES))

    def differentiated(self) -> Iterator[_Widths]:
        for signal, noise, kv in self._head_factors():
            for hidden in range(1, LARGEST_FACTOR + 1):
                for ffn in range(1, LARGEST_FACTOR + 1):
                    if hidden <= LARGEST_SKEW * ffn and ffn <= LARGEST_SKEW * hidden:
                        yield self._widths((signal, noise, kv, hidden, ffn))

    def _head_factors(self) -> Iterator[tuple[int, int, int]]:
        heads = self.sizes.heads
        for noise in range(1, LARGEST_FACTOR + 1):
            for ratio in range(heads.ratio + 1, LARGEST_SUPPORTED_RATIO + 1):
                signal, uneven = divmod(ratio * noise, heads.ratio)
                for kv in range(1, LARGEST_FACTOR + 1):
                    if not uneven and heads.groups_per_kv * noise % kv == 0:
                        yield signal, noise, kv

    def nearest(self, considered: Iterator[_Widths] | list[_Widths], measure: Measure, target: int) -> Arm | None:
        """The growth of these widths, and any depth, whose measure is nearest to the target; None of nothing."""
        found = min(
            ((*self._depth(widths, measure, target), widths.factors) for widths in considered), default=None
        )  # fmt: skip
        if found is None:
            return None
        _, depth, factors = found
        return Arm(self._recipe(factors, depth), self.model(self._sizes(factors, depth)))

    def _depth(self, widths: _Widths, measure: Measure, target: int) -> tuple[float, int]:
        """How far from the target these widths are at the best depth, as a factor of 1 or more, and that depth."""
        base = measure(widths.model)
        layer = measure(widths.deeper) - base
        below = (target - base) // layer
        # Something must grow.
        least = 1 if set(widths.factors) == {1} else 0
        depths = {min(max(depth, least), self.sizes.num_layers) for depth in (below, below + 1)}
        return min((_apart(base + depth * layer, target), depth) for depth in depths)

    def _widths(self, factors: tuple[int, ...]) -> _Widths:
        return _Widths(factors, self.model(self._sizes(factors, 0)), self.model(self._sizes(factors, 1)))

    def _sizes(self, factors: tuple[int, ...], depth: int) -> Sizes:
        signal, noise, kv, hidden, ffn = factors
        before = self.sizes
        heads = Heads(
            before.heads.num_groups * noise, before.heads.ratio * signal // noise, before.heads.num_kv_groups * kv
        )
        return Sizes(
            heads, before.head_dim, before.hidden * hidden, before.ffn * ffn, before.vocab, before.num_layers + depth
        )

    def _recipe(self, factors: tuple[int, ...], depth: int) -> Recipe:
        asked: dict[str, Any] = {"to": "motif"} if self._converts else {}
        if len(set(factors)) == 1:
            asked["uniform"] = factors[0]
        else:
            asked |= dict(zip(WIDTH_AXES, factors, strict=True))
        asked = {key: value for key, value in asked.items() if value != 1}
        return make_recipe(asked | ({"depth": depth} if depth else {}))


def _apart(number: int, target: int) -> float:
    return max(number / target, target / number)
