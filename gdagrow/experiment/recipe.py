"""What a user asks of an experiment: arms that differ in one thing, seeds, a budget, what is compared with what."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gdagrow.errors import RecipeError
from gdagrow.recipe import read_recipe
from gdagrow.train.recipe import Count, MidRunGrowth, Paths, Positive, Share, told_mistake

# What arms and the experiment itself say, so that the training recipe that all arms share must not.
_NOT_SHARED = ("data", "seed", "growth", "multipliers", "freeze")

Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
# Of an arm, or of a text, which has a directory of that name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Fields = Mapping[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class TextSource(_Strict):
    """A text, split into training and held-out documents.

    documents: Files or globs; `{stdlib}` stands for Python's own library.
    kind: What a document is: a file, an entry of WordNet's dictionary, or a book of the Bible.
    exclude: Files are left out if a part of their path is one of these.
    held_out: The share of documents that nothing is trained on.
    """

    documents: Paths
    kind: Literal["files", "wordnet", "bible"] = "files"
    exclude: tuple[str, ...] = ()
    held_out: Annotated[Share, Field(gt=0)] = 0.05


class Tuning(_Strict):
    """A sweep of peak learning rates, the same for every arm that does not go on from another one.

    steps: Of a run of the sweep. seed: Of those runs; none of the experiment's own.
    shared: All arms are of one size and take one rate, the best on average over them: by one short run each, arms would
        get rates that differ by chance, which no number of seeds makes up for.
    """

    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=2)]
    steps: Count
    seed: Seed
    shared: bool = False

    @model_validator(mode="after")
    def _each_once(self) -> "Tuning":
        if len({rate_name(rate) for rate in self.learning_rates}) < len(self.learning_rates):
            raise ValueError("learning_rates: expected each once, told apart by six digits")
        return self


def rate_name(rate: float) -> str:
    """A learning rate of a sweep as a name."""
    return f"{rate:g}"


class MapsPlan(_Strict):
    """Attention maps, measured every so many steps and at the end in the runs of the first `seeds` seeds.

    every: A multiple of `save_every`, since they are those of states.
    sequences: Held-out sequences that they are measured on.
    """

    every: Count
    seeds: Count
    sequences: Count = 4


class ArmSpec(_Strict):
    """What one arm has of its own.

    told: What it is called in tables and plots.
    config: Keys of the model's `config.json` that are other than in `base`.
    text, context_length, batch_size, steps: Other than those of `base`; the first text if left out. Arms of other
        contexts are evaluated on as much text, in fewer or more sequences than `evaluate_on`.
    parameters: Choose the FFN, of the model or of what it grows into, so that it has as many parameters as this arm.
    flops: Choose the steps so that training takes as many FLOPs as this arm's.
    learning_rate_of: Take the learning rate of this arm, which is of the same size, and sweep none.
    grown_from: The arm that it goes on from, where its growth is (`from` in YAML).
    growth, multipliers: As in a training recipe, one growth.
    """

    told: str
    config: Fields = {}
    text: str | None = None
    context_length: Count | None = None
    batch_size: Count | None = None
    steps: Count | None = None
    parameters: str | None = None
    flops: str | None = None
    learning_rate_of: str | None = None
    grown_from: str | None = Field(default=None, alias="from")
    growth: MidRunGrowth | None = None
    multipliers: bool = False

    @model_validator(mode="after")
    def _growth_from_an_arm(self) -> "ArmSpec":
        if (self.grown_from is None) != (self.growth is None):
            raise ValueError("from and growth go together: an arm that grows goes on from a run of another arm")
        if self.growth is None and self.multipliers:
            raise ValueError("multipliers are of a growth, and the arm has none")
        given = (self.config, self.text, self.context_length, self.batch_size, self.learning_rate_of)
        if self.grown_from is not None and any(given):
            raise ValueError(
                "an arm that goes on from another one has its config, text, context, batches and learning rate; leave "
                "them out"
            )
        if self.flops is not None and self.steps is not None:
            raise ValueError("flops chooses the steps; leave one of them out")
        return self

    @property
    def needed(self) -> tuple[str, ...]:
        """The arms that must be known before this one."""
        return tuple(other for other in (self.grown_from, self.parameters, self.flops) if other is not None)


class ComparisonSpec(_Strict):
    """Arms held against one of them, seed by seed.

    told: Its heading. matched: What all of them have as much of.
    """

    told: str
    matched: str
    reference: str
    arms: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_once(self) -> "ComparisonSpec":
        if len({self.reference, *self.arms}) <= len(self.arms):
            raise ValueError(f"{self.told}: expected reference and arms to name each arm once")
        return self


class Planned(_Strict):
    """What was expected before anything ran: the standard deviation of the paired difference of two arms, in nats."""

    sd: Positive


class ExperimentRecipe(_Strict):
    """An experiment, immutable.

    title, question: What it is called, and what it is to answer.
    texts: By name; the first is that of every arm that names none.
    base: A training recipe without what belongs to arms: its model has a `config`.
    seeds: Every arm is trained with every one, which fixes new weights and the order of the data.
    grow_at: The step after which arms grow that do not say it themselves.
    scales: By name, what is other than here at another scale; `quick` is `--quick`.
    """

    title: str
    question: str
    texts: Annotated[Mapping[Name, TextSource], Field(min_length=1)]
    base: Fields
    seeds: Annotated[tuple[Seed, ...], Field(min_length=2)]
    planned: Planned
    tune: Tuning | None = None
    maps: MapsPlan | None = None
    grow_at: Count | None = None
    arms: Annotated[Mapping[Name, ArmSpec], Field(min_length=2)]
    comparisons: Annotated[tuple[ComparisonSpec, ...], Field(min_length=1)]
    scales: Mapping[str, Fields] = {}

    @model_validator(mode="before")
    @classmethod
    def _grow_at(cls, values: Any) -> Any:
        """Put the step of growths into the arms that do not say it."""
        if not isinstance(values, dict) or "grow_at" not in values or not isinstance(values.get("arms"), Mapping):
            return values
        at = {"growth": {"at": values["grow_at"]}}  # what an arm says itself wins
        arms = {
            name: merged(at, arm) if isinstance(arm, Mapping) and isinstance(arm.get("growth"), Mapping) else arm
            for name, arm in values["arms"].items()
        }
        return {**values, "arms": arms}

    @model_validator(mode="after")
    def _consistent(self) -> "ExperimentRecipe":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: expected each once")
        if wrong := [key for key in _NOT_SHARED if key in self.base]:
            raise ValueError(f"base: {', '.join(wrong)} belong to arms or to the experiment; leave them out")
        model = self.base.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("config"), Mapping):
            raise ValueError("base: expected model with a config, the keys of a config.json")
        if self.tune and self.tune.seed in self.seeds:
            raise ValueError(f"tune: seed {self.tune.seed} is one of the experiment's own; give another")
        if self.maps and self.maps.seeds > len(self.seeds):
            raise ValueError(f"maps: expected at most {len(self.seeds)} seeds, got {self.maps.seeds}")
        self._require_names()
        return self

    def _require_names(self) -> None:
        named = [
            (f"arms.{name}.{key}", other)
            for name, arm in self.arms.items()
            for key, other in (("from", arm.grown_from), ("parameters", arm.parameters), ("flops", arm.flops),
                               ("learning_rate_of", arm.learning_rate_of))
        ]  # fmt: skip
        named += [(f"comparisons ({spec.told})", arm) for spec in self.comparisons
                  for arm in (spec.reference, *spec.arms)]  # fmt: skip
        for where, other in named:
            if other is not None and other not in self.arms:
                raise ValueError(f"{where}: there is no arm {other!r}, only {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            if arm.text is not None and arm.text not in self.texts:
                raise ValueError(f"arms.{name}: there is no text {arm.text!r}, only {', '.join(self.texts)}")
            if arm.grown_from and self.arms[arm.grown_from].grown_from:
                raise ValueError(f"arms.{name}: {arm.grown_from} goes on from another arm itself; name that one")
            if (other := arm.learning_rate_of) and (self.arms[other].learning_rate_of or self.arms[other].grown_from):
                raise ValueError(f"arms.{name}: {other} has its learning rate of another arm itself; name that one")
            for other in (arm.parameters, arm.flops):
                if other and (self.arms[other].parameters or self.arms[other].flops):
                    raise ValueError(f"arms.{name}: {other} is matched to another arm itself; name that one")
        try:
            _ = self.order
        except CycleError as error:
            raise ValueError(
                f"arms: {' needs '.join(reversed(error.args[1]))}, so that none can be the first"
            ) from None

    @property
    def order(self) -> tuple[str, ...]:
        """The arms, each after those that it goes on from or is matched to."""
        return tuple(TopologicalSorter({name: arm.needed for name, arm in self.arms.items()}).static_order())

    def text_of(self, arm: ArmSpec) -> str:
        """The name of an arm's text."""
        if arm.grown_from is not None:
            return self.text_of(self.arms[arm.grown_from])
        return arm.text or next(iter(self.texts))


def read_experiment(path: Path, scale: str | None = None) -> ExperimentRecipe:
    """Read an experiment from a YAML file, at one of the scales that it has.

    Raises:
        RecipeError: it cannot be read, has no such scale, or is no experiment: all that is wrong, in one sentence.
    """
    values, origin = read_recipe(path), f"recipe {path}"
    if scale is not None:
        scales = values.get("scales")
        if not isinstance(scales, dict) or not isinstance(scales.get(scale), dict):
            known = ", ".join(scales) if isinstance(scales, dict) and scales else "none"
            raise RecipeError(f"{origin}: there is no scale {scale!r}; it has {known}")
        values = merged(values, scales[scale])
        origin += f", scale {scale}"
    try:
        return ExperimentRecipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: " + "; ".join(told_mistake(item) for item in error.errors())) from None


def merged(values: Fields, changes: Fields) -> dict[str, Any]:
    """`values` with what `changes` says otherwise, mapping by mapping; null takes a key out."""
    found = dict(values)
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = merged(found[key], value)
        else:
            found[key] = value
    return found
