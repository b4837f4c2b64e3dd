"""Which source index each index of a grown model comes from, as its `growth.json` says, through all its growths."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from gdagrow.archs import Sizes
from gdagrow.axes import IndexMap
from gdagrow.depth import Layers
from gdagrow.errors import CheckpointError, CompareError
from gdagrow.growth import GrowthMaps
from gdagrow.heads import HeadGrowth, Heads, axis_maps
from gdagrow.record import FEATURES, RECORD_FILE, read_record, read_record_file

WAYS_OUT = "restore the file, or remove it to have the maps inferred from the two configs"


@dataclass(frozen=True)
class Ancestry:
    """Where every index of a grown model comes from.

    before: The sizes of the model that it comes from.
    maps: The maps of every axis, layer by layer.
    layers: Which of its layers each of the grown ones is, or is a copy of.
    num_growths: How many growths lie between.
    repairs: Whether one of them made small tensors anew, for layers that moved or features that are fresh.
    """

    before: Sizes
    maps: GrowthMaps
    layers: Layers
    num_growths: int
    repairs: bool


class _Widths(NamedTuple):
    groups: int
    ratio: int
    kv: int
    hidden: int
    ffn: int
    layers: int

    @staticmethod
    def of(sizes: Sizes) -> "_Widths":
        heads = sizes.heads
        return _Widths(heads.num_groups, heads.ratio, heads.num_kv_groups, sizes.hidden, sizes.ffn, sizes.num_layers)

    def __str__(self) -> str:
        return (
            f"{self.groups} groups of {self.ratio}:1 on {self.kv} KV groups, hidden {self.hidden}, FFN {self.ffn}, "
            f"{self.layers} layers"
        )


# New features in order: the old one, or None for one that comes from none.
_Features = list[int | None]


@dataclass(frozen=True)
class _Step:
    """A growth: for each new index the old one; `signal[l][g][j]` counts inside the old group `groups[g]`."""

    groups: list[int]
    signal: list[list[list[int]]]
    kv: list[int]
    hidden: _Features
    ffn: _Features
    layers: Layers

    def after(self, first: "_Step") -> "_Step":
        """This growth of what `first` made, as one growth."""
        source = self.layers.source
        new = {i for i, layer in enumerate(source) if i in self.layers.new or layer in first.layers.new}
        return _Step(
            groups=[first.groups[g] for g in self.groups],
            signal=[
                [
                    [first.signal[source[layer]][g][j] for j in heads]
                    for g, heads in zip(self.groups, of_layer, strict=True)
                ]
                for layer, of_layer in enumerate(self.signal)
            ],
            kv=[first.kv[c] for c in self.kv],
            hidden=[None if i is None else first.hidden[i] for i in self.hidden],
            ffn=[None if i is None else first.ffn[i] for i in self.ffn],
            layers=Layers(tuple(first.layers.source[layer] for layer in source), frozenset(new)),
        )


def ancestry_from(grown: Path, before: Sizes, after: Sizes, *, untied: bool) -> Ancestry | None:
    """The ancestry in `grown/growth.json`, back through earlier growths as far as a source.

    Args:
        grown: The grown checkpoint.
        before, after: The sizes of source and grown model.
        untied: Whether the source's embeddings are tied and the grown model's are not.

    Returns:
        None if there is no such file, or it tells how both came to be, as after a copy or a conversion.

    Raises:
        CheckpointError: the lineage is none of a growth that preserves the function, or not of these two models.
        CompareError: embeddings were untied in one of several growths.
    """
    path = grown / RECORD_FILE
    records = read_record(grown)
    if not records:
        return None
    try:
        steps = [_read_step(records.pop(), _Widths.of(after))]
        while records and steps[-1][1] != _Widths.of(before):
            steps.append(_read_step(records.pop(), steps[-1][1]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {_reason(error)}; {WAYS_OUT}") from None
    if steps[-1][1] == _Widths.of(before):
        if untied and len(steps) > 1:
            # The norm may carry parts from when they were tied still, and the head others: only their products sum up.
            raise CompareError(
                f"{path}: embeddings were untied in one of several growths, whose weights cannot be folded back "
                "at once; check each growth against its own source"
            )
        return _ancestry(steps, before, after)
    if _Widths.of(before) == _Widths.of(after):
        return None
    raise CheckpointError(
        f"{path}: its lineage leads back to {steps[-1][1]}, not to the source with {_Widths.of(before)}; {WAYS_OUT}"
    )


def last_growth(directory: Path, after: Sizes) -> Ancestry:
    """The ancestry that the last growth alone made, of the record in a checkpoint's directory.

    Args:
        directory: It has a `growth.json`.
        after: The sizes of the grown model.

    Raises:
        CheckpointError: it is not the lineage of a growth to a model of these sizes.
    """
    return _recorded(directory / RECORD_FILE, read_record(directory)[-1:], after)


def whole_ancestry(path: Path, after: Sizes) -> Ancestry:
    """The ancestry that a `growth.json` makes from the first source of its whole history.

    Args:
        path: The file.
        after: The sizes of the grown model.

    Raises:
        CheckpointError: it is not the lineage of growths, that preserve the function, to a model of these sizes.
    """
    return _recorded(path, read_record_file(path), after)


def _recorded(path: Path, records: list[Any], after: Sizes) -> Ancestry:
    try:
        steps = [_read_step(records.pop(), _Widths.of(after))]
        while records:
            steps.append(_read_step(records.pop(), steps[-1][1]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {_reason(error)}; it is not the lineage of a model with {_Widths.of(after)}: give the "
            f"{RECORD_FILE} that was written when this model was grown"
        ) from None
    return _ancestry(steps, _sizes(steps[-1][1], after), after)


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else "expected the lineage of a growth, got something else"


def _sizes(widths: _Widths, like: Sizes) -> Sizes:
    heads = Heads(widths.groups, widths.ratio, widths.kv)
    return replace(like, heads=heads, hidden=widths.hidden, ffn=widths.ffn, num_layers=widths.layers)


def _ancestry(steps: Sequence[tuple[_Step, _Widths]], before: Sizes, after: Sizes) -> Ancestry:
    made = steps[0][0]
    for earlier, _ in steps[1:]:
        made = made.after(earlier)
    plain = {
        "hidden": _feature_map(made.hidden, before.hidden), "ffn": _feature_map(made.ffn, before.ffn),
        "vocab": IndexMap.identity(before.vocab),
    }  # fmt: skip
    group, kv = IndexMap.of(made.groups, before.heads.num_groups), IndexMap.of(made.kv, before.heads.num_kv_groups)
    known = {
        heads: axis_maps(
            HeadGrowth(
                before.heads, after.heads, group, tuple(IndexMap.of(list(of), before.heads.ratio) for of in heads), kv
            ),
            before.head_dim, plain,
        )
        for heads in dict.fromkeys(_hashable(of_layer) for of_layer in made.signal)
    }  # fmt: skip
    by_layer = tuple(known[_hashable(of_layer)] for of_layer in made.signal)
    # Of each growth, for a block that was new in one may have moved in the next.
    repairs = any(step.layers.moved or None in step.hidden for step, _ in steps)
    return Ancestry(before, GrowthMaps(by_layer), made.layers, len(steps), repairs)


def _hashable(heads: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, heads))


def _feature_map(features: _Features, size: int) -> IndexMap:
    fresh = iter(range(size, size + len(features)))
    return IndexMap.of([next(fresh) if old is None else old for old in features], size)


def _read_step(record: Any, widths: _Widths) -> tuple[_Step, _Widths]:
    """Read one record of a growth to `widths`; returns also the widths that it grew from.

    Raises:
        KeyError, TypeError, ValueError: it is not the record of a growth to these widths that preserves the function.
    """
    lineage = record["lineage"]
    groups, kv = (_whole_numbers(lineage[key], key, size)
                  for key, size in (("noise_heads", widths.groups), ("kv_groups", widths.kv)))  # fmt: skip
    if "signal_heads_by_layer" in lineage:
        by_layer = _of_length(lineage["signal_heads_by_layer"], "signal_heads_by_layer", widths.layers)
        signal = [_signal_heads(of_layer, groups, widths) for of_layer in by_layer]
    else:
        signal = [_signal_heads(lineage["signal_heads"], groups, widths)] * widths.layers
    fresh = lineage.get("fresh", {})
    if not isinstance(fresh, dict):
        raise ValueError(f"fresh: expected a number of features by axis, got {type(fresh).__name__}")
    hidden, ffn = (_features(lineage[axis], axis, size, fresh.get(axis, 0))
                   for axis, size in zip(FEATURES, (widths.hidden, widths.ffn), strict=True))  # fmt: skip
    step = _Step(groups, signal, kv, hidden, ffn, _layers(lineage, widths.layers))
    old = _Widths(
        max(groups) + 1, max(chain.from_iterable(chain.from_iterable(signal))) + 1, max(kv) + 1, _num_old(hidden),
        _num_old(ffn), max(step.layers.source) + 1,
    )  # fmt: skip
    _require_complete(step, old)
    served, old_served = widths.groups // widths.kv, old.groups // old.kv
    if old.groups % old.kv or any(kv[new // served] != group // old_served for new, group in enumerate(groups)):
        raise ValueError("kv_groups: a query group is not served by a copy of its own KV group")
    return step, old


def _signal_heads(value: Any, groups: list[int], widths: _Widths) -> list[list[int]]:
    signal = []
    for new, heads in enumerate(_of_length(value, "signal_heads", widths.groups)):
        pairs = [_whole_numbers(pair, "signal_heads", 2) for pair in _of_length(heads, "signal_heads", widths.ratio)]
        if any(group != groups[new] for group, _ in pairs):
            raise ValueError(
                f"signal_heads: group {new} has copies of signal heads of another group than its noise head"
            )
        signal.append([head for _, head in pairs])
    return signal


def _layers(lineage: Any, num_layers: int) -> Layers:
    if "layers" not in lineage:
        return Layers.unchanged(num_layers)
    source = _whole_numbers(lineage["layers"], "layers", num_layers)
    new = frozenset(_whole_numbers(lineage["new_layers"], "new_layers", len(lineage["new_layers"])))
    old = [layer for i, layer in enumerate(source) if i not in new]
    if len(old) + len(new) != num_layers or old != list(range(len(old))) or max(source) >= len(old):
        raise ValueError("layers: expected every old layer once and in order, beside new ones")
    return Layers(tuple(source), new)


def _num_old(features: _Features) -> int:
    return max((old for old in features if old is not None), default=-1) + 1


def _require_complete(step: _Step, old: _Widths) -> None:
    for of_layer in step.signal:
        heads = {(group, head) for group, heads in zip(step.groups, of_layer, strict=True) for head in heads}
        if (len(heads), len(set(step.groups)), len(set(step.kv))) != (old.groups * old.ratio, old.groups, old.kv):
            raise ValueError("signal_heads, noise_heads or kv_groups: an old head has no copy")
    for axis, features, size in zip(FEATURES, (step.hidden, step.ffn), (old.hidden, old.ffn), strict=True):
        counts = Counter(feature for feature in features if feature is not None)
        if not size or len(counts) != size or len(set(counts.values())) != 1:
            # RMSNorm and PolyNorm average over the axis.
            raise ValueError(f"{axis}: expected as many copies of every old feature")
        if features.count(None) >= size:
            # A growth makes as many whole copies as there is room for, and what it makes up for is of that share.
            raise ValueError(f"{axis}: expected fewer than {size} fresh features, got {features.count(None)}")


def _of_length(value: Any, key: str, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise ValueError(f"{key}: expected {length} entries, got {got}")
    return value


def _whole_numbers(value: Any, key: str, length: int) -> list[int]:
    for number in _of_length(value, key, length):
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"{key}: expected indices, got {number!r:.40}")
    return list(value)


def _features(runs: Any, key: str, size: int, fresh: Any) -> _Features:
    """Expand runs of old features; their sum is checked before anything of that length is made."""
    found = [_whole_numbers(run, key, 2) for run in _of_length(runs, key, len(runs))]
    (num_fresh,) = _whole_numbers([fresh], key, 1)
    total = sum(stop - start for start, stop in found) + num_fresh
    if total != size or any(stop <= start for start, stop in found):
        raise ValueError(f"{key}: expected runs of {size} old features in all, got {total}")
    old: Iterable[int] = chain.from_iterable(range(start, stop) for start, stop in found)
    return [*old, *[None] * num_fresh]
