"""Head growth: lineages worked out by hand, refusals, and the equal-share rule against sums of gradients."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.errors import PlanError
from gdagrow.heads import HeadCopies, HeadGrowth, Heads, Ratio, axis_maps, first_copies, grow_heads
from tests.growths import RANDOM


@pytest.mark.parametrize(
    ("heads", "growth", "group", "signal", "kv", "unequal"),
    [
        pytest.param(
            Heads(2, 3, 1), {"signal": 2}, [0, 1], [[0, 1, 2, 0, 1, 2]] * 2, [0], set(), id="3:1, signal x2"
        ),
        pytest.param(
            Heads(2, 3, 1), {"signal": Ratio(4)}, [0, 1], [[0, 1, 2, 0]] * 2, [0], set(), id="3:1 to 4:1"
        ),
        pytest.param(
            Heads(2, 4, 2), {"signal": Ratio(7)}, [0, 1], [[0, 1, 2, 3, 0, 1, 2]] * 2, [0, 1], set(), id="4:1 to 7:1"
        ),
        pytest.param(
            Heads(2, 3, 1), {"signal": 2, "noise": 2}, [0, 1, 0, 1], [[0, 1, 2]] * 4, [0], set(),
            id="noise x2, signal x2: whole copies of the block",
        ),
        pytest.param(
            Heads(2, 1, 2), {"signal": 2, "noise": 2}, [0, 0, 1, 1], [[0]] * 4, [0, 1], set(),
            id="noise x2, signal x2 with two KV groups: each copy beside what its KV group serves",
        ),
        pytest.param(
            Heads(2, 3, 1), {"signal": 2, "noise": 2, "kv": 2}, [0, 1, 0, 1], [[0, 1, 2]] * 4, [0, 0], set(),
            id="kv x2 with noise x2: each KV copy serves one whole copy",
        ),
        pytest.param(
            Heads(4, 1, 2), {"signal": 2, "noise": 2, "kv": 2}, [0, 1, 2, 3] * 2, [[0]] * 8, [0, 1, 0, 1], set(),
            id="uniform x2",
        ),
        pytest.param(
            Heads(1, 2, 1), {"signal": 3, "noise": 3, "kv": 3}, [0, 0, 0], [[0, 1]] * 3, [0, 0, 0], set(),
            id="uniform x3",
        ),
        pytest.param(
            Heads(1, 3, 1), {"signal": Ratio(4), "noise": 2}, [0, 0], [[0, 1, 2, 0]] * 2, [0], set(),
            id="a target ratio holds for every noise copy",
        ),
        pytest.param(
            Heads(2, 3, 1), {"signal": Ratio(4), "copies": ((2, 1, 1), (1, 1, 2))}, [0, 1],
            [[0, 1, 2, 0], [0, 1, 2, 2]], [0], set(), id="a choice for each group",
        ),
        pytest.param(
            Heads(1, 3, 1), {"signal": Ratio(7), "copies": ((1, 4, 2),)}, [0], [[0, 1, 2, 1, 2, 1, 1]], [0], set(),
            id="a choice is laid out round by round",
        ),
        pytest.param(
            Heads(2, 2, 2), {"signal": Ratio(3), "noise": 2, "kv": 2, "copies": ((1, 2), (2, 1))}, [0, 1, 0, 1],
            [[0, 1, 1], [0, 1, 0]] * 2, [0, 1, 0, 1], set(), id="a choice holds for every copy of its group",
        ),
        pytest.param(
            Heads(1, 2, 1), {"noise": 2}, [0, 0], [[0], [1]], [0], {"group"},
            id="noise x2 alone splits the signal heads of a group",
        ),
        pytest.param(
            Heads(1, 3, 1), {"signal": 2, "noise": 3}, [0, 0, 0], [[0, 1], [2, 0], [1, 2]], [0], {"group"},
            id="noise x3, signal x2: no copy serves all signal heads",
        ),
        pytest.param(Heads(2, 1, 1), {"kv": 2}, [0, 1], [[0], [0]], [0, 0], {"kv"}, id="kv x2 alone splits consumers"),
        pytest.param(
            Heads(1, 2, 1), {"noise": 2, "kv": 2}, [0, 0], [[0], [1]], [0, 0], {"group", "kv"},
            id="noise x2 and kv x2 without signal",
        ),
    ],
)  # fmt: skip
def test_worked_examples(
    heads: Heads, growth: dict[str, Any], group: list[int], signal: list[list[int]], kv: list[int], unequal: set[str]
) -> None:
    grown = grow_heads(heads, **{"signal": 1, "noise": 1, "kv": 1, **growth})
    assert list(grown.group) == group
    assert [list(heads) for heads in grown.signal] == signal
    assert list(grown.kv) == kv
    assert grown.lineage() == [[[g, j] for j in slots] for g, slots in zip(group, signal, strict=True)]
    assert grown.unequal == unequal
    assert grown.after == Heads(len(group), len(signal[0]), len(kv))


def test_head_counts() -> None:
    heads = Heads(num_groups=8, ratio=4, num_kv_groups=2)
    assert (heads.num_signal_heads, heads.num_query_heads, heads.groups_per_kv) == (32, 40, 4)
    assert str(Ratio(4)) == "4:1"


@pytest.mark.parametrize(
    ("heads", "growth", "message"),
    [
        (
            Heads(2, 3, 1), {"signal": Ratio(2)},
            "signal 2:1: the ratio would shrink from 3:1; growth never drops a head, choose 3:1 or more",
        ),
        (
            Heads(2, 3, 1), {"signal": Ratio(512), "noise": 3},
            "signal 512:1 with noise x3: a signal head would have 513 copies, expected at most 512; "
            "choose smaller ones",
        ),
        (
            Heads(2, 2, 1), {"signal": Ratio(258), "noise": 2, "copies": ((129, 129), (1, 257))},
            "signal 258:1 with noise x2: a signal head would have 514 copies, expected at most 512; "
            "choose smaller ones",
        ),
        (
            Heads(2, 3, 1), {"noise": 2},
            "signal x1 with noise x2: 6 signal heads do not divide into 4 groups; "
            "make 3 x signal a multiple of noise",
        ),
        (
            Heads(4, 3, 2), {"kv": 3},
            "kv x3: 6 KV groups do not divide 4 query groups (one noise head each); with noise x1, "
            "choose kv from 1, 2",
        ),
        (
            Heads(2, 3, 2), {"signal": 2, "noise": 2, "kv": 4},
            "kv x4: 8 KV groups do not divide 4 query groups (one noise head each); with noise x2, "
            "choose kv from 1, 2",
        ),
    ],
)  # fmt: skip
def test_refusals(heads: Heads, growth: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        grow_heads(heads, **{"signal": 1, "noise": 1, "kv": 1, **growth})
    assert str(error.value) == message


@st.composite
def choices(draw: st.DrawFn, groups: int, ratio: int, target: int) -> HeadCopies:
    """Any counts of 1 or more with the sum `target`, for every group."""
    more = [draw(st.lists(st.integers(0, ratio - 1), min_size=target - ratio, max_size=target - ratio))
            for _ in range(groups)]  # fmt: skip
    return tuple(tuple(1 + drawn.count(head) for head in range(ratio)) for drawn in more)


@st.composite
def head_growths(draw: st.DrawFn, *, chosen: bool = True) -> HeadGrowth:
    """A growth of random heads; if `chosen`, often one whose target ratio clones heads as some choice says."""
    kv_groups, served, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    groups, noise = kv_groups * served, draw(st.integers(1, 4))
    kv = draw(st.sampled_from([k for k in range(1, served * noise + 1) if served * noise % k == 0]))
    by_factor = st.sampled_from([s for s in range(1, 9) if ratio * s % noise == 0] or [noise])
    by_target = st.builds(Ratio, st.integers(ratio, 12))
    signal = draw(by_factor | by_target)
    choose = chosen and isinstance(signal, Ratio) and draw(st.integers(0, 3)) > 0
    copies = draw(choices(groups, ratio, signal.signal)) if choose else None
    return grow_heads(Heads(groups, ratio, kv_groups), signal=signal, noise=noise, kv=kv, copies=copies)


def copies_of_signal_heads(grown: HeadGrowth) -> list[tuple[int, int]]:
    return [(group, head) for group, heads in zip(grown.group, grown.signal, strict=True) for head in heads]


@settings(RANDOM)
@given(head_growths())
def test_every_head_has_a_copy_where_it_belongs(grown: HeadGrowth) -> None:
    before, after = grown.before, grown.after
    heads = copies_of_signal_heads(grown)
    assert set(heads) == {(group, head) for group in range(before.num_groups) for head in range(before.ratio)}
    assert set(grown.group) == set(range(before.num_groups))
    assert set(grown.kv) == set(range(before.num_kv_groups))
    assert [len(list(heads)) for heads in grown.signal] == [after.ratio] * after.num_groups
    for new, heads_of_group in enumerate(grown.lineage()):
        old = list(grown.group)[new]
        assert {group for group, _ in heads_of_group} == {old}, "signal heads of another group than the noise head's"
        served_by = list(grown.kv)[new // after.groups_per_kv]
        assert served_by == old // before.groups_per_kv, "served by a copy of another KV group"


@settings(RANDOM)
@given(st.data(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9), st.integers(1, 3))
def test_a_choice_is_kept_in_every_copy_of_its_group(
    data: st.DataObject, groups: int, ratio: int, more: int, noise: int
) -> None:
    target = Ratio(ratio + more)
    copies = data.draw(choices(groups, ratio, target.signal))
    grown = grow_heads(Heads(groups, ratio, 1), signal=target, noise=noise, kv=1, copies=copies)
    for old, heads in zip(grown.group, grown.signal, strict=True):
        assert tuple(list(heads).count(head) for head in range(ratio)) == copies[old]
        assert list(heads)[:ratio] == list(range(ratio))
    # All moments can be carried: whole copies of a group serve equal shares, however often its heads are in it.
    assert grown.unequal == set()


@settings(RANDOM)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 9), st.integers(1, 3))
def test_the_first_heads_are_what_is_cloned_without_a_choice(groups: int, ratio: int, more: int, noise: int) -> None:
    heads, target = Heads(groups, ratio, 1), Ratio(ratio + more)
    copies = (first_copies(ratio, target.signal),) * groups
    assert list(copies[0]) == sorted(copies[0], reverse=True)
    assert copies[0][0] - copies[0][-1] <= 1
    grown = grow_heads(heads, signal=target, noise=noise, kv=1)
    assert grown == grow_heads(heads, signal=target, noise=noise, kv=1, copies=copies)
    assert all(list(found) == [i % ratio for i in range(target.signal)] for found in grown.signal)


@settings(RANDOM)
@given(head_growths(chosen=False))
def test_copies_are_as_even_as_the_factors_allow(grown: HeadGrowth) -> None:
    """No signal head of a group has two copies more than another, and all groups and KV groups have as many."""
    heads = copies_of_signal_heads(grown)
    for group in range(grown.before.num_groups):
        counts = [heads.count((group, head)) for head in range(grown.before.ratio)]
        assert max(counts) - min(counts) <= grown.after.num_groups // grown.before.num_groups
    for found, num_old in ((list(grown.group), grown.before.num_groups), (list(grown.kv), grown.before.num_kv_groups)):
        assert {found.count(old) for old in range(num_old)} == {len(found) // num_old}


@settings(RANDOM, max_examples=200)
@given(head_growths())
def test_unequal_shares_are_those_whose_gradients_would_be_wrong(grown: HeadGrowth) -> None:
    """Give each old signal head a gradient of its own, linearly independent of the others', and follow it.

    A copy of a head whose o_proj columns are split in `n` passes on `1/n` of the head's gradient; a noise head or a
    KV group collects what the signal heads that it serves pass on.
    """
    before, after, heads = grown.before, grown.after, copies_of_signal_heads(grown)
    gradient = {(g, j): Fraction(1000) ** (g * before.ratio + j) for g, j in heads}
    passed_on = [
        sum((gradient[head] / heads.count(head) for head in heads[new * after.ratio : (new + 1) * after.ratio]),
            start=Fraction(0))
        for new in range(after.num_groups)
    ]  # fmt: skip
    old_noise = [sum(gradient[g, j] for j in range(before.ratio)) for g in range(before.num_groups)]
    groups = range(before.num_groups)
    old_kv = [sum(old_noise[g] for g in groups if g // before.groups_per_kv == c) for c in range(before.num_kv_groups)]
    noise_copies = after.num_groups // before.num_groups
    kv_copies = after.num_kv_groups // before.num_kv_groups
    wrong = set()
    if any(passed_on[new] != old_noise[old] / noise_copies for new, old in enumerate(grown.group)):
        wrong.add("group")
    served = after.groups_per_kv
    if any(sum(passed_on[c * served : (c + 1) * served]) != old_kv[old] / kv_copies for c, old in enumerate(grown.kv)):
        wrong.add("kv")
    assert grown.unequal == wrong


def test_axis_maps_join_head_and_plain_axes() -> None:
    grown = grow_heads(Heads(1, 2, 1), signal=1, noise=2, kv=1)
    maps = axis_maps(grown, 4, {"hidden": grown.kv})
    assert maps.unequal == {"group"}
    assert set(maps.maps) == {"hidden", "group", "signal", "kv", "head_dim"}
    assert list(maps.of("signal", 1)) == [1]
    assert maps.of("head_dim", None).is_identity
