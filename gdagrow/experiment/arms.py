"""The arms of an experiment as training recipes, their sizes matched, their costs known before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdagrow.archs import Sizes
from gdagrow.errors import GdagrowError, RecipeError
from gdagrow.experiment.recipe import ArmSpec, ExperimentRecipe, Fields, merged
from gdagrow.train.dry_run import Leg, forecast, headers_of
from gdagrow.train.recipe import FIXED, TrainRecipe, make_train_recipe
from gdagrow.train.schedule import learning_rate_factor

# GPUs multiply matrices fast whose sizes are multiples of this, and a wide FFN is fine enough in such units.
_WIDE_UNIT, _WIDE = 8, 1024

_EVALUATE_ON = TrainRecipe.model_fields["evaluate_on"].default

TRAINING_FILE, HELD_OUT_FILE = "train.bin", "held-out.bin"


@dataclass(frozen=True)
class Arm:
    """An arm before its learning rate and seed are known.

    recipe: Its training recipe with the learning rate of `base` and seed 0.
    config, sizes: Of the model at the end.
    parameters: Of the model at the end.
    flops: Of its whole training, that of the arm it goes on from included.
    own_flops: Without that.
    """

    name: str
    spec: ArmSpec
    text: str
    recipe: TrainRecipe
    config: Mapping[str, Any]
    sizes: Sizes
    parameters: int
    flops: int
    own_flops: int

    @property
    def tokens(self) -> int:
        """All tokens trained on."""
        return self.recipe.steps * self.recipe.batch_size * self.recipe.context_length

    @property
    def fork(self) -> int | None:
        """The step of the other arm from whose state it goes on."""
        return self.spec.growth.at if self.spec.growth else None

    def at(self, learning_rate: float, seed: int, *, steps: int | None = None) -> TrainRecipe:
        """The run of this arm at a learning rate with a seed; of fewer steps for a sweep, and then evaluated once."""
        optimizer = self.recipe.optimizer.model_copy(update={"learning_rate": learning_rate})
        changes: dict[str, Any] = {"optimizer": optimizer, "seed": seed}
        if steps is not None:
            changes |= {"steps": steps, "evaluate_every": 0, "save_every": steps}
        return _checked(self.recipe, changes, f"arm {self.name}")


def make_arms(recipe: ExperimentRecipe, texts: Path) -> dict[str, Arm]:
    """The arms by name, in the recipe's order.

    Args:
        recipe: The experiment.
        texts: The directory with a directory for each text, in which its tokens are, or will be.

    Raises:
        GdagrowError: an arm is no training run, cannot grow so, cannot be matched, or does not share its beginning with
            the arm that it goes on from.
    """
    made: dict[str, Arm] = {}
    for name in recipe.order:
        made[name] = _made(recipe, name, texts, made)
    for arm in made.values():
        _require_shared_beginning(arm, made)
        if recipe.maps is not None and recipe.maps.every % arm.recipe.save_every:
            raise RecipeError(
                f"maps: every {recipe.maps.every} steps is not where arm {arm.name} leaves states; let save_every "
                f"({arm.recipe.save_every}) divide it"
            )
    return {name: made[name] for name in recipe.arms}


def _made(recipe: ExperimentRecipe, name: str, texts: Path, made: Mapping[str, Arm]) -> Arm:
    spec = recipe.arms[name]
    arm = _resolved(recipe, name, _fields(recipe, name, texts, made))
    if spec.parameters is not None:
        arm = _with_parameters(recipe, arm, made[spec.parameters].parameters)
    if spec.flops is not None:
        arm = _with_flops(recipe, arm, made[spec.flops].flops)
    return arm


def _fields(recipe: ExperimentRecipe, name: str, texts: Path, made: Mapping[str, Arm]) -> dict[str, Any]:
    """The training recipe of an arm as plain fields."""
    spec, text = recipe.arms[name], texts / recipe.text_of(recipe.arms[name])
    own = {key: value for key in ("context_length", "batch_size", "steps") if (value := getattr(spec, key)) is not None}
    if spec.grown_from is not None:
        begun = made[spec.grown_from].recipe.as_dict()
        return {**begun, **own, "growth": [spec.growth], "multipliers": spec.multipliers,
                "health_every": recipe.base.get("health_every", 0)}  # fmt: skip
    data = {"train": str(text / TRAINING_FILE), "evaluation": str(text / HELD_OUT_FILE)}
    model = {**recipe.base["model"], "config": merged(recipe.base["model"]["config"], spec.config)}
    # Health is that of copies, which a model has that was grown.
    fields = merged(dict(recipe.base), {**own, "data": data, "health_every": 0}) | {"model": model}
    if spec.context_length is not None:
        fields["evaluate_on"] = _same_text(name, recipe.base, spec.context_length)
    return fields


def _same_text(name: str, base: Fields, length: int) -> int:
    """As many sequences of an arm's own length as have the held-out text of the other arms."""
    of_others, count = base.get("context_length"), base.get("evaluate_on", _EVALUATE_ON)
    if not isinstance(of_others, int) or not isinstance(count, int) or of_others * count % length:
        raise RecipeError(
            f"arm {name}: context_length {length} does not divide the held-out text of other arms, evaluate_on "
            f"({count}) sequences of context_length ({of_others}); change one of them"
        )
    return of_others * count // length


def _resolved(recipe: ExperimentRecipe, name: str, fields: Mapping[str, Any]) -> Arm:
    made = make_train_recipe(fields, f"arm {name}")
    try:
        legs, config = forecast(made, 1).legs, headers_of(made, 1)[-1].config
    except GdagrowError as error:  # which knows of no arms
        raise RecipeError(f"arm {name}: {error}") from None
    return Arm(
        name=name,
        spec=recipe.arms[name],
        text=recipe.text_of(recipe.arms[name]),
        recipe=made,
        config=config,
        sizes=legs[-1].model.sizes,
        parameters=legs[-1].model.num_parameters,
        flops=sum(_flops(leg) for leg in legs),
        own_flops=_flops(legs[-1]),
    )


def _flops(leg: Leg) -> int:
    return leg.flops_per_step * (leg.end - leg.begin)


def _with_parameters(recipe: ExperimentRecipe, arm: Arm, wanted: int) -> Arm:
    """The arm with the FFN that brings it nearest to so many parameters, which grow linearly with it."""
    ffn = int(arm.config["intermediate_size"])
    more = _with_ffn(recipe, arm, ffn + 1)
    per_unit = more.parameters - arm.parameters
    unit = _WIDE_UNIT if ffn >= _WIDE else 1
    chosen = round((ffn + (wanted - arm.parameters) / per_unit) / unit) * unit
    smallest = int(arm.recipe.model.config["intermediate_size"]) if arm.spec.growth and arm.recipe.model.config else 1
    if chosen < smallest:
        raise RecipeError(
            f"arm {arm.name}: with the smallest FFN it has {arm.parameters + (smallest - ffn) * per_unit:,} "
            f"parameters, more than the {wanted:,} of {arm.spec.parameters}; give that arm a larger FFN"
        )
    return _with_ffn(recipe, arm, chosen)


def _with_ffn(recipe: ExperimentRecipe, arm: Arm, ffn: int) -> Arm:
    fields = arm.recipe.as_dict()
    if arm.spec.growth is None:
        changed = merged(fields, {"model": {"config": {"intermediate_size": ffn}}})
    else:
        expand = {key: value for key, value in arm.spec.growth.expand.as_dict().items() if key not in ("ffn", "ffn_to")}
        growth = {**fields["growth"][0], "expand": {**expand, "ffn_to": ffn}}
        changed = {**fields, "growth": [growth]}
    return _resolved(recipe, arm.name, changed)


def _with_flops(recipe: ExperimentRecipe, arm: Arm, wanted: int) -> Arm:
    """The arm with the steps that bring its training nearest to so many FLOPs."""
    last = forecast(arm.recipe, 1).legs[-1]
    steps = arm.recipe.steps + round((wanted - arm.flops) / last.flops_per_step)
    if steps <= last.begin:
        raise RecipeError(
            f"arm {arm.name}: its training takes as many FLOPs as that of {arm.spec.flops} before step {last.begin}, "
            "where it grows; grow it earlier, or match another arm"
        )
    changed = {**arm.recipe.as_dict(), "steps": steps}
    if (
        decay := arm.recipe.schedule.decay
    ) is not None:  # the same share of what is left, so the schedule keeps its shape
        share = (steps - last.begin) / (arm.recipe.steps - last.begin)
        changed = merged(changed, {"schedule": {"decay": max(1, round(decay * share))}})
    return _resolved(recipe, arm.name, changed)


def _require_shared_beginning(arm: Arm, arms: Mapping[str, Arm]) -> None:
    if arm.spec.grown_from is None or arm.fork is None:
        return
    source, at = arms[arm.spec.grown_from].recipe, arm.fork
    if at >= source.steps or at % source.save_every:
        raise RecipeError(
            f"arm {arm.name} grows after step {at}, where {arm.spec.grown_from} leaves no state; let save_every "
            f"({source.save_every}) divide it, before the last step ({source.steps})"
        )
    differ = [key for key in FIXED if getattr(source, key) != getattr(arm.recipe, key)]
    # A growth that begins the schedule anew does so after its step.
    rates = [[learning_rate_factor(recipe, step) for step in range(at)] for recipe in (source, arm.recipe)]
    if rates[0] != rates[1]:
        differ.append("schedule (wsd is the same for runs of any length until it decays)")
    if differ:
        raise RecipeError(
            f"arm {arm.name} goes on from {arm.spec.grown_from} at step {at}, but until there it has another "
            f"{', '.join(differ)}"
        )


def _checked(recipe: TrainRecipe, changes: Fields, origin: str) -> TrainRecipe:
    return make_train_recipe({**recipe.as_dict(), **changes}, origin)
