"""What a user may want to know of a plan before going on; never a refusal."""

from collections.abc import Iterator

from gdagrow.heads import LARGEST_SUPPORTED_RATIO
from gdagrow.plan import GrowthPlan
from gdagrow.views import why_float64
from gdagrow.views.deeper import NEW_BLOCK


def hints_of(plan: GrowthPlan) -> tuple[str, ...]:
    """What a user may want to know before going on; never a refusal."""
    hints = [*_of_fresh(plan), *_of_float64(plan), *_of_function(plan)]
    ratio = plan.after.heads.ratio
    if ratio > LARGEST_SUPPORTED_RATIO:
        hints.append(f"the ratio {ratio}:1 is above {LARGEST_SUPPORTED_RATIO}:1, where the paper saw quality "
                     f"decline (3:1 to 4:1 train best){_back_in_range(plan)}")  # fmt: skip
    if plan.recipe.exact_copies:
        hints.append("exact copies see identical gradients and stay identical for ever in training")
    lost: dict[str, dict[str, None]] = {}
    for tensor in plan.tensors:
        if tensor.moments_lost and tensor.moments_lost != NEW_BLOCK:
            lost.setdefault(tensor.moments_lost, {})[tensor.parameter.removeprefix("model.layers.{layer}.")] = None
    if lost:
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in lost.items())
        hints.append(f"optimizer moments cannot be carried exactly for {told}")
    return tuple(hints)


def _of_fresh(plan: GrowthPlan) -> Iterator[str]:
    """What comes from none of the source's weights."""
    drawn = f"drawn uniformly with deviation {plan.deviation:g} and seed {plan.recipe.seed}"
    hidden, ffn = (plan.maps.common.of(axis, None).num_fresh for axis in ("hidden", "ffn"))
    if hidden:
        key = str(plan.architecture.norm_eps)
        yield (
            f"hidden: {hidden} features are new and zero; the weights that read them are {drawn}; {key} "
            f"{plan.header.stored.config[key]:g} to {plan.config[key]:g}"
        )
    if ffn:
        yield f"ffn: {ffn} units are new, {drawn}, and read with weights of zero"


def _of_float64(plan: GrowthPlan) -> Iterator[str]:
    """What is stored in float64 though its source is not."""
    made: dict[str, dict[str, None]] = {}
    for tensor in plan.tensors:
        if (reason := why_float64(plan.header, tensor.source.name)) is not None:
            made.setdefault(reason, {})[tensor.parameter.removeprefix("model.layers.{layer}.")] = None
    if made:
        told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in made.items())
        yield (
            f"stored in float64, because a shorter dtype would round them: {told}; a trainer that casts them "
            "changes the function by that rounding"
        )


def _of_function(plan: GrowthPlan) -> Iterator[str]:
    """What changes the function, because the recipe says so."""
    if "rope_theta" in plan.changed_keys:
        before, after = plan.changed_keys["rope_theta"]
        yield (
            f"rope_theta {before} to {after} changes the function, as the recipe asks: the grown "
            "model is another one until it is trained"
        )


def _back_in_range(plan: GrowthPlan) -> str:
    before, after = plan.before.heads, plan.after.heads
    noise = after.num_groups // before.num_groups
    signal, uneven = divmod(after.num_signal_heads, before.num_signal_heads)
    for more in range(2, after.ratio + 1):
        if after.ratio % more == 0 and after.ratio // more <= LARGEST_SUPPORTED_RATIO:
            if isinstance(plan.recipe.signal, int) and plan.recipe.uniform == 1:
                return f"; noise x{noise * more} as well would make it {after.ratio // more}:1"
            # Neither a target ratio nor a uniform factor gives way to a noise factor beside it.
            factors = f"signal x{signal}, noise x{noise * more}"
            return "" if uneven else f"; the factors {factors} would make it {after.ratio // more}:1"
    return ""
