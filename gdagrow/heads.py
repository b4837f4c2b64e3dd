"""How the heads of grouped differential attention grow: query groups, signal heads inside them, KV groups."""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from gdagrow.axes import AxisMaps, IndexMap
from gdagrow.errors import PlanError

# Copies of one index: beyond any growth worth doing, within what the exact split of float64 can carry (9 spare bits).
MAX_COPIES = 512

# Query heads of a model, whose maps are made head by head.
MAX_HEADS = 2**16

# The paper's ratios decline beyond this many signal heads to a noise head.
LARGEST_SUPPORTED_RATIO = 5

# How often each signal head of each group stands in one copy of its group: `copies[group][head]`, never 0.
HeadCopies = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """A target ratio of `signal` signal heads to one noise head, in every group."""

    signal: int

    def __str__(self) -> str:
        return f"{self.signal}:1"


@dataclass(frozen=True)
class Heads:
    """`num_groups` query groups of `ratio` signal heads and one noise head, served by `num_kv_groups` KV groups.

    value_heads: How many times `head_dim` wide the values are that a map is applied to.
    """

    value_heads: ClassVar[int] = 2

    num_groups: int
    ratio: int
    num_kv_groups: int

    @property
    def num_signal_heads(self) -> int:
        return self.num_groups * self.ratio

    @property
    def num_query_heads(self) -> int:
        return self.num_groups * (self.ratio + 1)

    @property
    def told_ratio(self) -> str:
        return str(Ratio(self.ratio))

    @property
    def groups_per_kv(self) -> int:
        return self.num_groups // self.num_kv_groups


@dataclass(frozen=True)
class HeadGrowth:
    """The grown heads and their index maps (new -> old): groups, signal heads in each new group, KV groups."""

    before: Heads
    after: Heads
    group: IndexMap
    signal: tuple[IndexMap, ...]
    kv: IndexMap

    def lineage(self) -> list[list[list[int]]]:
        """For each new group, the old `[group, signal head]` of each of its signal heads."""
        return [[[group, head] for head in heads] for group, heads in zip(self.group, self.signal, strict=True)]

    @property
    def unequal(self) -> frozenset[str]:
        """The axes among `group` (its noise head) and `kv` whose copies serve unequal shares of the old consumers."""
        copies = Counter((group, head) for group, heads in zip(self.group, self.signal, strict=True) for head in heads)
        by_group: list[dict[tuple[int, int], Fraction]] = []
        by_kv: list[dict[tuple[int, int], Fraction]] = [{} for _ in range(self.after.num_kv_groups)]
        for new, (group, heads) in enumerate(zip(self.group, self.signal, strict=True)):
            share = {(group, j): Fraction(n, copies[group, j]) for j, n in Counter(heads).items()}
            by_group.append(share)
            served = by_kv[new // self.after.groups_per_kv]
            for head, part in share.items():
                served[head] = served.get(head, Fraction(0)) + part
        unequal = set()
        if not _all_equal(by_group, self.before.ratio, self.after.num_groups // self.before.num_groups):
            unequal.add("group")
        heads_per_kv = self.before.ratio * self.before.groups_per_kv
        if not _all_equal(by_kv, heads_per_kv, self.after.num_kv_groups // self.before.num_kv_groups):
            unequal.add("kv")
        return frozenset(unequal)


def _all_equal(shares: list[dict[tuple[int, int], Fraction]], num_consumers: int, copies: int) -> bool:
    return all(len(s) == num_consumers and all(part == Fraction(1, copies) for part in s.values()) for s in shares)


def grow_heads(
    heads: Heads, *, signal: int | Ratio, noise: int, kv: int, copies: HeadCopies | None = None
) -> HeadGrowth:
    """Clone signal heads `signal` times, or up to a target ratio, noise heads `noise` times and KV groups `kv` times.

    New query groups are laid out as whole copies of the old block of their KV group, so that each KV copy serves one
    complete copy of its consumers wherever the factors allow it; copies of a signal head stay before their noise head.

    Args:
        copies: With a target ratio, how often each signal head stands in a copy of its group, which sums up to the
            ratio; None for as evenly as can be, the first heads once more. A copy of a group holds all its heads, then
            those with a second copy, then those with a third.

    Raises:
        PlanError: the new heads do not divide into groups, or the groups into KV groups, or the ratio would shrink, or
            a signal head would have too many copies.
    """
    ratio = _grown_ratio(heads, signal, noise)
    if copies is not None:
        assert isinstance(signal, Ratio), f"signal {signal} leaves nothing to choose"
        _require_few(signal, noise, max(map(max, copies)))
    after = Heads(heads.num_groups * noise, ratio, heads.num_kv_groups * kv)
    if after.num_query_heads > MAX_HEADS:
        raise PlanError(
            f"signal x{signal} with noise x{noise}: {after.num_query_heads} query heads, expected at most {MAX_HEADS}; "
            "choose smaller ones"
        )
    if after.num_groups % after.num_kv_groups:
        fitting = [k for k in range(1, after.num_groups // heads.num_kv_groups + 1)
                   if after.num_groups % (k * heads.num_kv_groups) == 0]  # fmt: skip
        raise PlanError(
            f"kv x{kv}: {after.num_kv_groups} KV groups do not divide {after.num_groups} query groups "
            f"(one noise head each); with noise x{noise}, choose kv from {', '.join(map(str, fitting))}"
        )
    if isinstance(signal, Ratio):
        chosen = copies or (first_copies(heads.ratio, ratio),) * heads.num_groups
        pattern = [[_in_rounds(counts)] * noise for counts in chosen]
    else:
        slots = list(range(heads.ratio)) * signal
        pattern = [[slots[copy * ratio : (copy + 1) * ratio] for copy in range(noise)]] * heads.num_groups
    served = heads.groups_per_kv
    order: list[tuple[int, int]] = []  # (old group, copy of it), in new order
    for tile in range(kv):
        for c in range(heads.num_kv_groups):
            block = [(c * served + i, copy) for copy in range(noise) for i in range(served)]
            order += block[tile * after.groups_per_kv : (tile + 1) * after.groups_per_kv]
    return HeadGrowth(
        before=heads,
        after=after,
        group=IndexMap.of([group for group, _ in order], heads.num_groups),
        signal=tuple(IndexMap.of(pattern[group][copy], heads.ratio) for group, copy in order),
        kv=IndexMap.tile(heads.num_kv_groups, kv),
    )


def first_copies(ratio: int, target: int) -> tuple[int, ...]:
    """As even counts as make up a target ratio, of which the first heads have one more."""
    return tuple((target - head - 1) // ratio + 1 for head in range(ratio))


def _in_rounds(counts: tuple[int, ...]) -> list[int]:
    return [head for done in range(max(counts)) for head, count in enumerate(counts) if count > done]


def _require_few(signal: Ratio, noise: int, copies: int) -> None:
    """Raise PlanError if a signal head would have more copies, `copies` in each of its `noise` groups, than may be."""
    if copies * noise > MAX_COPIES:
        raise PlanError(
            f"signal {signal} with noise x{noise}: a signal head would have {copies * noise} copies, expected at most "
            f"{MAX_COPIES}; choose smaller ones"
        )


def _grown_ratio(heads: Heads, signal: int | Ratio, noise: int) -> int:
    if isinstance(signal, Ratio):
        if signal.signal < heads.ratio:
            raise PlanError(
                f"signal {signal}: the ratio would shrink from {heads.ratio}:1; growth never drops a head, "
                f"choose {heads.ratio}:1 or more"
            )
        _require_few(signal, noise, first_copies(heads.ratio, signal.signal)[0])
        return signal.signal
    if heads.ratio * signal % noise:
        raise PlanError(
            f"signal x{signal} with noise x{noise}: {heads.num_signal_heads * signal} signal heads do not divide into "
            f"{heads.num_groups * noise} groups; make {heads.ratio} x signal a multiple of noise"
        )
    return heads.ratio * signal // noise


def axis_maps(heads: HeadGrowth, head_dim: int, plain: dict[str, IndexMap]) -> AxisMaps:
    """The maps of the head axes joined with those of the plain axes (`hidden`, `ffn`, `vocab`)."""
    return AxisMaps(
        {
            **plain,
            "group": heads.group,
            "signal": heads.signal,
            "kv": heads.kv,
            "head_dim": IndexMap.identity(head_dim),
        },
        heads.unequal,
    )
