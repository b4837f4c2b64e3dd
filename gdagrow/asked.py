"""What a recipe asks of a checkpoint, held against its sizes: layers, features, and keys of its config."""

from collections.abc import Mapping
from typing import Any, Final

from gdagrow.archs import Architecture, Sizes
from gdagrow.axes import IndexMap
from gdagrow.depth import EVEN, Layers, place_blocks
from gdagrow.errors import PlanError
from gdagrow.heads import MAX_COPIES
from gdagrow.recipe import Recipe

# Of weights that are free, where the model's config has no `initializer_range`.
DEFAULT_DEVIATION: Final = 0.02


def whole_factor(recipe: Recipe, axis: str) -> int:
    """A factor that can be no ratio."""
    factor = recipe.factor(axis)
    assert isinstance(factor, int)
    return factor


def layers_asked(before: Sizes, recipe: Recipe) -> Layers:
    """Which layers there shall be.

    Raises:
        PlanError: there would be fewer, or they cannot be placed so.
    """
    if recipe.layers is not None and recipe.layers < before.num_layers:
        raise PlanError(
            f"layers {recipe.layers}: the source has {before.num_layers}, and growth never drops a layer; choose "
            f"{before.num_layers} or more"
        )
    more = recipe.depth or 0 if recipe.layers is None else recipe.layers - before.num_layers
    placement = recipe.insert or EVEN
    if recipe.layers is None and recipe.depth is None and placement.where == "after":
        more = len(placement.layers)
    if recipe.insert is not None and not more:
        raise PlanError(f"insert {placement}: there are no new blocks, for the source has {before.num_layers} layers")
    if more > MAX_COPIES:
        raise PlanError(f"{more} new blocks: expected at most {MAX_COPIES} in one growth; ask for fewer")
    return place_blocks(before.num_layers, more, placement) if more else Layers.unchanged(before.num_layers)


def features_asked(size: int, recipe: Recipe, axis: str) -> IndexMap:
    """The map of the residual stream, or of the FFN, of `size` in the source.

    Raises:
        PlanError: there would be fewer, or too many copies.
    """
    target: int | None = getattr(recipe, f"{axis}_to")
    if target is None:
        return IndexMap.tile(size, whole_factor(recipe, axis))
    if target < size:
        raise PlanError(
            f"{axis} to {target}: the source has {size}, and growth never drops a feature; choose {size} or more"
        )
    if target // size > MAX_COPIES:
        raise PlanError(f"{axis} to {target}: more than {MAX_COPIES} copies of {size}; choose a smaller size")
    return IndexMap.extended(size, target)


def require_ffn(architecture: Architecture, config: Mapping[str, Any], ffn: IndexMap) -> None:
    """Raise PlanError if FFN units would be fresh beside an activation that averages over all of them."""
    if not ffn.num_fresh or not architecture.averages_ffn(config):
        return
    size, target = ffn.old_size, ffn.size
    nearest = " or ".join(str(size * copies) for copies in (target // size, target // size + 1))
    raise PlanError(
        f"ffn {size} to {target}: PolyNorm averages over all FFN units, with an eps that no config holds, so that "
        f"units beside whole copies would change all others; choose {nearest}"
    )


def changes_config(config: Mapping[str, Any], recipe: Recipe) -> bool:
    return any(config.get(key) != value for key, value in changed_keys(config, recipe).items())


def changed_keys(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Keys of the config that are no sizes, as the recipe names them."""
    keys: dict[str, Any] = {}
    if recipe.max_position_embeddings is not None:
        keys["max_position_embeddings"] = recipe.max_position_embeddings
    if recipe.rope_theta is not None:
        newer = config.get("rope_parameters")  # where transformers 5 has it
        if isinstance(newer, Mapping):
            keys["rope_parameters"] = {**newer, "rope_theta": recipe.rope_theta}
        if "rope_theta" in config or "rope_parameters" not in keys:
            keys["rope_theta"] = recipe.rope_theta
    return keys


def rope_theta(config: Mapping[str, Any]) -> Any:
    """The base of RoPE as a config has it, None if it has none."""
    newer = config.get("rope_parameters")
    return config.get("rope_theta", newer.get("rope_theta") if isinstance(newer, Mapping) else None)


def deviation_asked(config: Mapping[str, Any]) -> float:
    """How widely free weights are drawn: as the model's own config says that weights are."""
    found = config.get("initializer_range")
    return found if isinstance(found, float) and 0 < found < 1 else DEFAULT_DEVIATION
