"""The growth that leads from one model to the sizes of another, derived from their two configs.

Every obstacle on the way is found before anything is said, and each is told with the sizes that could be reached.
"""

from collections.abc import Callable, Mapping
from math import isclose
from typing import Any, Final

from gdagrow.archs import whole_number
from gdagrow.depth import EVEN, place_blocks
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.heads import MAX_COPIES, Ratio, grow_heads
from gdagrow.recipe import Recipe, make_recipe
from gdagrow.targets import HIDDEN_NORM_EPS, DescribedModel, read_target

# What a recipe that names a target may say beside it, and the recipe made of it says as well.
_OWN: Final = ("select", "insert", "exact_copies", "snr_db", "seed")

# Digits of an eps that a config written by hand may leave out.
_EPS_DIGITS: Final = 1e-6

# Key, how to read it, and why it stays as it is.
_KEPT: Final[tuple[tuple[str, Callable[[DescribedModel], Any], str], ...]] = (
    ("head_dim", lambda m: m.sizes.head_dim, "the softmax scale and RoPE depend on it"),
    ("vocab_size", lambda m: m.sizes.vocab, "the vocabulary does not grow"),
    ("hidden_act", lambda m: m.config["hidden_act"], "another activation is another function"),
    ("biases", lambda m: bool(m.config.get("use_bias") or m.config.get("attention_bias")), "none is added or dropped"),
    ("rope_scaling", lambda m: m.rope_scaling, "another RoPE is another function"),
    ("use_sliding_window", lambda m: bool(m.config.get("use_sliding_window")), "a window is another function"),
)

# Takes source, target, recipe and the obstacles so far, to which it adds its own; returns fields of the new recipe.
_Derivation = Callable[[DescribedModel, DescribedModel, Recipe, list[str]], dict[str, Any]]


def with_derived_sizes(config: Mapping[str, Any], recipe: Recipe) -> Recipe:
    """A recipe as it is, or, where it names a target (`like`), the one that leads there: see `recipe_like`."""
    return recipe if recipe.like is None else recipe_like(config, read_target(recipe.like), recipe)


def recipe_like(config: Mapping[str, Any], target: Mapping[str, Any], recipe: Recipe) -> Recipe:
    """Derive every factor of the growth from a source to the sizes of a target.

    Args:
        config: Of the source.
        target: The config of the model whose sizes are to be reached. Of constants that it does not say, the source's
            stay.
        recipe: Names the target (`like`), and may say what two configs do not: `select`, `insert`, `rope_theta` if the
            target's is another, and how copies are told apart.

    Returns:
        A recipe with the derived fields in place of `like`.

    Raises:
        CheckpointError: a config makes no sense.
        PlanError: names every obstacle, or says that nothing would grow.
    """
    source = DescribedModel.of(config)
    try:
        wanted = DescribedModel.of(target)
    except CheckpointError as error:
        raise CheckpointError(f"like {recipe.like}: {error}") from None
    obstacles: list[str] = []
    derived: dict[str, Any] = {}
    for derive in _DERIVATIONS:
        derived |= derive(source, wanted, recipe, obstacles)
    if obstacles:
        raise PlanError(f"like {recipe.like} cannot be reached: {'; '.join(obstacles)}")
    if not derived:
        raise PlanError(f"like {recipe.like}: nothing would grow: the source has these sizes already")
    own = {key: value for key in _OWN if key in recipe.model_fields_set and (value := getattr(recipe, key)) is not None}
    return make_recipe(own | derived, f"like {recipe.like}")


def _layout(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    ours, theirs = source.architecture.name, target.architecture.name
    asked = recipe.to or ours
    if asked != theirs and (recipe.to is not None or theirs != "motif"):
        obstacles.append(
            f"model_type: the target has the {theirs} layout and the source would have {asked}; a checkpoint is "
            "converted to motif alone"
        )
    if theirs == "motif" and (recipe.to is not None or ours != theirs):
        return {"to": theirs}
    return {}


def _kept(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    for key, read, reason in _KEPT:
        _require_same(key, read(source), read(target), reason, obstacles)
    return {}


def _require_same(key: str, ours: Any, theirs: Any, reason: str, obstacles: list[str]) -> None:
    if theirs != ours:
        obstacles.append(
            f"{key}: the target has {_told(theirs)} and the source {_told(ours)}; {reason}, so only {_told(ours)} is "
            "reachable"
        )


def _heads(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    before, after = source.sizes.heads, target.sizes.heads
    noise = _whole_factor("noise heads", before.num_groups, after.num_groups, obstacles)
    kv = _whole_factor("KV groups", before.num_kv_groups, after.num_kv_groups, obstacles)
    if noise is None:
        return {}
    signal = _signal(source, target, recipe, noise, obstacles)
    if kv is None or signal is None:
        return {}
    try:
        grow_heads(before, signal=signal, noise=noise, kv=kv)
    except PlanError as error:
        obstacles.append(str(error))
    factors = {"signal": str(signal) if isinstance(signal, Ratio) else signal, "noise": noise, "kv": kv}
    return {axis: factor for axis, factor in factors.items() if factor != 1}


def _signal(
    source: DescribedModel, target: DescribedModel, recipe: Recipe, noise: int, obstacles: list[str]
) -> int | Ratio | None:  # fmt: skip
    """A whole factor if there is one and nothing is to be selected, else the target's ratio."""
    before, after = source.sizes.heads, target.sizes.heads
    is_whole = after.num_signal_heads % before.num_signal_heads == 0
    if is_whole and recipe.select is None:
        return _whole_factor("signal heads", before.num_signal_heads, after.num_signal_heads, obstacles)
    if after.ratio > before.ratio:
        return Ratio(after.ratio)
    if is_whole:
        obstacles.append(
            f"select {recipe.select}: from {before.ratio}:1 to {after.ratio}:1 every signal head is cloned equally "
            "often; leave it out"
        )
        return None
    smaller = [f"{before.ratio * s // noise}:1" for s in range(1, noise) if before.ratio * s % noise == 0]
    obstacles.append(
        f"ratio: the target has {after.ratio}:1 and the source {before.ratio}:1; with {noise} times the noise heads "
        f"{', '.join([*smaller, f'{before.ratio}:1'])} and above are reachable, for no signal head is dropped"
    )
    return None


def _widths(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    hidden_alone = ffn_alone = ""
    if target.has_one_eps:
        hidden_alone = f"the {target.architecture.name} layout has one {HIDDEN_NORM_EPS} for hidden and head norms"
    if source.config["hidden_act"] == "poly_norm":
        ffn_alone = "PolyNorm takes the mean over the FFN with an eps that is not stored"
    before, after = source.sizes, target.sizes
    hidden = _width("hidden", "hidden_size", before.hidden, after.hidden, hidden_alone, obstacles)
    ffn = _width("ffn", "intermediate_size", before.ffn, after.ffn, ffn_alone, obstacles)
    _require_eps(source, target, "hidden_to" in hidden, obstacles)
    return hidden | ffn


def _width(axis: str, key: str, before: int, after: int, alone: str, obstacles: list[str]) -> dict[str, Any]:
    """A whole factor, or a size where `alone` does not say why whole factors alone will do."""
    if after < before:
        obstacles.append(f"{key}: the target has {after} and the source {before}; {before} or more is reachable")
    elif after % before and alone:
        lower = after // before * before
        obstacles.append(
            f"{key}: the target has {after}, which is no multiple of the source's {before}, and {alone}; the nearest "
            f"reachable are {lower} and {lower + before}"
        )
    elif after % before:
        return {f"{axis}_to": after}
    elif (factor := _whole_factor(key, before, after, obstacles)) not in (1, None):
        return {axis: factor}
    return {}


def _require_eps(
    source: DescribedModel, target: DescribedModel, is_widened_by_zeros: bool, obstacles: list[str]
) -> None:
    another = "another one is another function"
    if not target.has_one_eps:
        _require_same("attn_rms_norm_eps", source.head_norm_eps, target.head_norm_eps, another, obstacles)
    ours, theirs = (model.config.get(HIDDEN_NORM_EPS) for model in (source, target))
    if theirs is None:
        return
    if is_widened_by_zeros and isinstance(ours, float) and isinstance(theirs, float):
        # A growth by zeros changes the eps itself (growth-math 3.3), and a target may say so.
        before, after = source.sizes.hidden, target.sizes.hidden
        if isclose(theirs, ours * (after // before * before / after), rel_tol=_EPS_DIGITS):
            return
    _require_same(HIDDEN_NORM_EPS, ours, theirs, another, obstacles)


def _depth(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    before, after = source.sizes.num_layers, target.sizes.num_layers
    if after < before:
        obstacles.append(
            f"num_hidden_layers: the target has {after} and the source {before}; {before} or more is reachable"
        )
    elif after > before:
        try:
            place_blocks(before, after - before, recipe.insert or EVEN)
        except PlanError as error:
            obstacles.append(str(error))
        return {"layers": after}
    elif recipe.insert is not None:
        obstacles.append(f"insert {recipe.insert}: the target has {after} layers like the source; leave it out")
    return {}


def _embeddings(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    if target.is_tied and not source.is_tied:
        obstacles.append(
            "tie_word_embeddings: the target has true and the source false; two matrices do not become one, so only "
            "false is reachable"
        )
        return {}
    reached = "keep" if target.is_tied else "untie"
    if recipe.embeddings is not None and (not source.is_tied or recipe.embeddings != reached):
        told = "tied" if target.is_tied else "not tied"
        obstacles.append(f"embeddings {recipe.embeddings}: the target's are {told}; leave it out")
    return {"embeddings": "untie"} if source.is_tied and not target.is_tied else {}


def _rope(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    ours = source.rope_theta
    theirs = ours if target.rope_theta is None else target.rope_theta
    if recipe.rope_theta is not None and recipe.rope_theta != theirs:
        obstacles.append(
            f"rope_theta {_told(recipe.rope_theta)}: the target has {_told(theirs)}; give that one, or leave it out"
        )
    elif theirs != ours and recipe.rope_theta is None:
        obstacles.append(
            f"rope_theta: the target has {_told(theirs)} and the source {_told(ours)}; only {_told(ours)} keeps the "
            f"function; add --rope-theta {_told(theirs)} (rope_theta: {_told(theirs)} in a recipe) to change it"
        )
    return {} if theirs == ours else {"rope_theta": theirs}


def _context(source: DescribedModel, target: DescribedModel, recipe: Recipe, obstacles: list[str]) -> dict[str, Any]:
    """The context has no part in the function, so any may follow any."""
    key = "max_position_embeddings"
    ours, theirs, asked = source.config.get(key), target.config.get(key), recipe.max_position_embeddings
    if theirs is None:
        return {} if asked is None else {key: asked}
    whole_number(target.config, key, obstacles)
    if asked not in (None, theirs):
        obstacles.append(f"{key} {asked}: the target has {theirs}; leave it out")
    return {} if theirs == ours else {key: theirs}


_DERIVATIONS: Final[tuple[_Derivation, ...]] = (_layout, _kept, _heads, _widths, _depth, _embeddings, _rope, _context)


def _whole_factor(what: str, before: int, after: int, obstacles: list[str]) -> int | None:
    factor, rest = divmod(after, before)
    if rest:
        near = " and ".join(str(size) for size in (factor * before, (factor + 1) * before) if size)
        obstacles.append(
            f"{what}: the target has {after}, which is no multiple of the source's {before}; the nearest reachable: "
            f"{near}"
        )
        return None
    if factor > MAX_COPIES:
        obstacles.append(
            f"{what}: the target has {after}, {factor} times the source's {before}; at most {MAX_COPIES} times, "
            f"{MAX_COPIES * before}, is reachable"
        )
        return None
    return factor


def _told(value: Any) -> str:
    if isinstance(value, bool) or not value:
        return {True: "true", False: "false"}.get(value, "none") if isinstance(value, bool) else "none"
    return f"{value:.15g}" if isinstance(value, int | float) else str(value)
