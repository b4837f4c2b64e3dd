"""Which source index each grown index comes from: as `growth.json` says, or as two configs allow only one growth."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdagrow.archs import Sizes, architecture_of
from gdagrow.axes import AxisMaps, IndexMap
from gdagrow.errors import CheckpointError, CompareError, PlanError
from gdagrow.header import Header
from gdagrow.heads import MAX_COPIES, HeadGrowth, Heads, Ratio, axis_maps, grow_heads
from gdagrow.record import RECORD_FILE, read_record, read_record_file


@dataclass(frozen=True)
class _Step:
    """One recorded growth: for each new index the old one; `signal[g][j]` counts inside the old group `groups[g]`."""

    groups: list[int]
    signal: list[list[int]]
    kv: list[int]
    hidden: list[int]
    ffn: list[int]

    def after(self, first: "_Step") -> "_Step":
        """This growth of what `first` made, as one growth."""
        return _Step(
            groups=[first.groups[g] for g in self.groups],
            signal=[[first.signal[g][j] for j in heads] for g, heads in zip(self.groups, self.signal, strict=True)],
            kv=[first.kv[c] for c in self.kv],
            hidden=[first.hidden[i] for i in self.hidden],
            ffn=[first.ffn[i] for i in self.ffn],
        )


# Groups, signal heads to a group, KV groups, hidden, FFN.
_Widths = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Lineage:
    """The maps from a source's indices to a grown model's, and the file that they come from."""

    maps: AxisMaps
    origin: str


def lineage_of(source: Header, grown: Header, *, untied: bool = False) -> Lineage:
    """Find the maps that lead from one checkpoint to another.

    Args:
        source, grown: The checkpoints.
        untied: Whether the source's embeddings are tied and the grown model's are not, and the maps are for weights.

    Raises:
        CheckpointError: there is a `growth.json` that does not fit.
        CompareError: the models differ in what growth never changes, or there are no such maps; says which sizes.
    """
    architectures = [architecture_of(header.config) for header in (source, grown)]
    before, after = (a.sizes(header.config) for a, header in zip(architectures, (source, grown), strict=True))
    fixed = {
        "architecture": tuple(a.name for a in architectures),
        "vocabulary": (before.vocab, after.vocab),
        "layers": (before.num_layers, after.num_layers),
        "head_dim": (before.head_dim, after.head_dim),
    }
    problems = [f"{what} {a} and {b}" for what, (a, b) in fixed.items() if a != b]
    if problems:
        raise CompareError(
            f"{source.directory} and {grown.directory} have {', '.join(problems)}, which growth never changes"
        )
    recorded = recorded_maps(grown.directory, before, after, untied=untied)
    return Lineage(recorded, RECORD_FILE) if recorded else Lineage(inferred_maps(before, after), "config.json")


def recorded_maps(grown: Path, before: Sizes, after: Sizes, *, untied: bool) -> AxisMaps | None:
    """The maps that the lineage in `grown/growth.json` makes, back through earlier growths as far as the source.

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
        step, widths = _read_step(records.pop(), _widths(after))
        made = step
        while records and widths != _widths(before):
            earlier, widths = _read_step(records.pop(), widths)
            made = made.after(earlier)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else "expected the lineage of a growth, got something else"
        raise CheckpointError(f"{path}: {reason}; {_WAYS_OUT}") from None
    if widths == _widths(before):
        if untied and made is not step:
            # The norm may carry parts from when they were tied still, and the head others: only their products sum up.
            raise CompareError(
                f"{path}: embeddings were untied in one of several growths, whose weights cannot be folded back "
                "at once; check each growth against its own source"
            )
        return _maps(made, before, after)
    if _widths(before) == _widths(after):
        return None
    raise CheckpointError(
        f"{path}: its lineage leads back to {_told(widths)}, not to the source with {_told(_widths(before))}; "
        f"{_WAYS_OUT}"
    )


_WAYS_OUT = "restore the file, or remove it to have the maps inferred from the two configs"


def recorded_growth(path: Path, after: Sizes) -> tuple[AxisMaps, Sizes]:
    """The maps that a `growth.json` makes from the first source of its whole history, and the sizes of that source.

    Args:
        path: The file.
        after: The sizes of the grown model.

    Raises:
        CheckpointError: it is not the lineage of growths, that preserve the function, to a model of these sizes.
    """
    records = read_record_file(path)
    try:
        made, widths = _read_step(records.pop(), _widths(after))
        while records:
            earlier, widths = _read_step(records.pop(), widths)
            made = made.after(earlier)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else "expected the lineage of a growth, got something else"
        raise CheckpointError(
            f"{path}: {reason}; it is not the lineage of a model with {_told(_widths(after))}: give the {RECORD_FILE} "
            "that was written when this model was grown"
        ) from None
    groups, ratio, kv, hidden, ffn = widths
    before = replace(after, heads=Heads(groups, ratio, kv), hidden=hidden, ffn=ffn)
    return _maps(made, before, after), before


def _read_step(record: Any, widths: _Widths) -> tuple[_Step, _Widths]:
    """Read one record of a growth to `widths`; returns also the widths that it grew from.

    Raises:
        KeyError, TypeError, ValueError: it is not the record of a growth to these widths that preserves the function.
    """
    lineage = record["lineage"]
    num_groups, ratio, num_kv, hidden, ffn = widths
    groups, kv = (_whole_numbers(lineage[key], key, size)
                  for key, size in (("noise_heads", num_groups), ("kv_groups", num_kv)))  # fmt: skip
    signal = []
    for new, heads in enumerate(_of_length(lineage["signal_heads"], "signal_heads", num_groups)):
        pairs = [_whole_numbers(pair, "signal_heads", 2) for pair in _of_length(heads, "signal_heads", ratio)]
        if any(group != groups[new] for group, _ in pairs):
            raise ValueError(
                f"signal_heads: group {new} has copies of signal heads of another group than its noise head"
            )
        signal.append([head for _, head in pairs])
    step = _Step(
        groups, signal, kv, _features(lineage["hidden"], "hidden", hidden), _features(lineage["ffn"], "ffn", ffn)
    )
    old = (max(groups) + 1, max(map(max, signal)) + 1, max(kv) + 1, max(step.hidden) + 1, max(step.ffn) + 1)
    _require_complete(step, old)
    served, old_served = num_groups // num_kv, old[0] // old[2]
    if old[0] % old[2] or any(kv[new // served] != group // old_served for new, group in enumerate(groups)):
        raise ValueError("kv_groups: a query group is not served by a copy of its own KV group")
    return step, old


def _require_complete(step: _Step, old: _Widths) -> None:
    heads = {(group, head) for group, heads in zip(step.groups, step.signal, strict=True) for head in heads}
    found = len(heads), len(set(step.groups)), len(set(step.kv))
    if found != (old[0] * old[1], old[0], old[2]):
        raise ValueError("signal_heads, noise_heads or kv_groups: an old head has no copy")
    for axis, indices, size in (("hidden", step.hidden, old[3]), ("ffn", step.ffn, old[4])):
        counts = Counter(indices)
        if len(counts) != size or len(set(counts.values())) != 1:
            # RMSNorm and PolyNorm average over the axis.
            raise ValueError(f"{axis}: expected as many copies of every old feature")


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


def _features(runs: Any, key: str, size: int) -> list[int]:
    """Expand runs of old features; their sum is checked before anything of that length is made."""
    found = [_whole_numbers(run, key, 2) for run in _of_length(runs, key, len(runs))]
    total = sum(stop - start for start, stop in found)
    if total != size or any(stop <= start for start, stop in found):
        raise ValueError(f"{key}: expected runs of {size} old features in all, got {total}")
    return [feature for start, stop in found for feature in range(start, stop)]


def inferred_maps(before: Sizes, after: Sizes) -> AxisMaps:
    """The maps of the growth by whole factors, or to a target ratio, that leads from one model's sizes to another's.

    Raises:
        CompareError: there is none.
    """
    old, new = before.heads, after.heads
    pairs = {
        "hidden": (before.hidden, after.hidden),
        "ffn": (before.ffn, after.ffn),
        "noise heads": (old.num_groups, new.num_groups),
        "KV groups": (old.num_kv_groups, new.num_kv_groups),
    }
    problems = [f"{axis} {a} to {b}" for axis, (a, b) in pairs.items() if b % a or b // a > MAX_COPIES]
    signal, uneven = divmod(new.num_signal_heads, old.num_signal_heads)
    if not problems:
        try:
            heads = grow_heads(
                old, signal=Ratio(new.ratio) if uneven else signal,
                noise=new.num_groups // old.num_groups, kv=new.num_kv_groups // old.num_kv_groups,
            )  # fmt: skip
        except PlanError:
            problems = [f"signal heads {old.num_signal_heads} to {new.num_signal_heads}"]
    if problems:
        raise CompareError(
            f"there is no {RECORD_FILE} that says how the one grew into the other, and no whole factors lead from "
            f"{', '.join(problems)}"
        )
    return _axis_maps(heads, IndexMap.tile(before.hidden, after.hidden // before.hidden),
                      IndexMap.tile(before.ffn, after.ffn // before.ffn), before)  # fmt: skip


def _maps(step: _Step, before: Sizes, after: Sizes) -> AxisMaps:
    heads = HeadGrowth(
        before.heads, after.heads, IndexMap.of(step.groups, before.heads.num_groups),
        tuple(IndexMap.of(heads, before.heads.ratio) for heads in step.signal),
        IndexMap.of(step.kv, before.heads.num_kv_groups),
    )  # fmt: skip
    return _axis_maps(heads, IndexMap.of(step.hidden, before.hidden), IndexMap.of(step.ffn, before.ffn), before)


def _axis_maps(heads: HeadGrowth, hidden: IndexMap, ffn: IndexMap, before: Sizes) -> AxisMaps:
    vocab = IndexMap.identity(before.vocab)
    return axis_maps(heads, before.head_dim, {"hidden": hidden, "ffn": ffn, "vocab": vocab})


def _widths(sizes: Sizes) -> _Widths:
    heads = sizes.heads
    return heads.num_groups, heads.ratio, heads.num_kv_groups, sizes.hidden, sizes.ffn


def _told(widths: _Widths) -> str:
    groups, ratio, kv, hidden, ffn = widths
    return f"{groups} groups of {ratio}:1 on {kv} KV groups, hidden {hidden}, FFN {ffn}"
