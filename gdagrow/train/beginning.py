"""The beginning of a run: what lies in its directory, and whether the recipe may go on with it."""

import io
from pathlib import Path

from gdagrow.errors import TrainError
from gdagrow.train.recipe import FIXED, MidRunGrowth, TrainRecipe, read_train_recipe
from gdagrow.train.run_directory import (
    MODEL,
    RECIPE_FILE,
    RunState,
    clear,
    is_begun,
    last_state,
    remove,
    remove_unfinished,
    replace_file,
    writing,
)


def begin(recipe: TrainRecipe, run: Path, *, resume: bool, restart: bool) -> None:
    """Make the run's directory ready, which is there.

    Raises:
        TrainError: it has a run already that is done, was another one, or shall neither be resumed nor restarted.
    """
    if restart:
        clear(run)
    if is_begun(run) and not resume:
        raise TrainError(f"{run} is not empty; --resume goes on with the run in it, --restart begins it anew")
    remove_unfinished(run)
    last = last_state(run)
    changed = _changed(recipe, read_train_recipe(run / RECIPE_FILE), last) if (run / RECIPE_FILE).exists() else []
    if changed and last is not None:
        raise TrainError(
            f"{run} was begun with another {', '.join(changed)} than the recipe says; take {run / RECIPE_FILE}, or "
            "begin anew with --restart"
        )
    if changed:
        clear(run)  # there is nothing yet that another recipe could spoil, but tokens
    if last is not None and last.step >= recipe.steps and (run / MODEL).exists():
        raise TrainError(f"{run}: all {recipe.steps} steps are done; to go on, ask for more steps in the recipe")
    remove(run, MODEL)
    write_recipe(recipe, run / RECIPE_FILE)


def _changed(recipe: TrainRecipe, before: TrainRecipe, last: RunState | None) -> list[str]:
    """What of a recipe is another than it was and must not be."""
    changed = [key for key in FIXED if getattr(recipe, key) != getattr(before, key)]
    if last is not None and _done(recipe, last) != _done(before, last):
        changed.append("growth")
    return changed


def _done(recipe: TrainRecipe, last: RunState) -> list[MidRunGrowth]:
    return [growth for growth in recipe.growth if growth.at < last.step + last.grown]


def write_recipe(recipe: TrainRecipe, path: Path) -> None:
    """Write the recipe of a run, whole or not at all.

    Raises:
        TrainError: the disk refuses.
    """
    from ruamel.yaml import YAML

    text, writer = io.StringIO(), YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump(recipe.as_dict(), text)
    with writing(path.parent, RECIPE_FILE):
        replace_file(path, text.getvalue())
