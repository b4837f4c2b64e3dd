"""Which source index each grown index comes from: as `growth.json` says, or as two configs allow only one growth."""

from dataclasses import dataclass

from gdagrow.archs import Architecture, Sizes, architecture_of
from gdagrow.axes import IndexMap
from gdagrow.depth import Layers
from gdagrow.errors import CheckpointError, CompareError, PlanError
from gdagrow.growth import GrowthMaps
from gdagrow.header import Header
from gdagrow.heads import MAX_COPIES, Ratio, axis_maps, grow_heads
from gdagrow.record import FEATURES, RECORD_FILE
from gdagrow.verify.ancestry import WAYS_OUT, Ancestry, ancestry_from
from gdagrow.views.deeper import deepened
from gdagrow.views.wider import with_gains


@dataclass(frozen=True)
class Lineage(Ancestry):
    """An ancestry, and the file that it comes from."""

    origin: str

    def seen(self, source: Header) -> Header:
        """The source with the grown model's layers and gains, all of whose tensors the maps lead from.

        Raises:
            CompareError: small tensors were made anew in one of several growths, which cannot be done at once.
        """
        architecture = architecture_of(source.config)
        if self.repairs and self.num_growths > 1:
            raise CompareError(
                f"{RECORD_FILE} tells of {self.num_growths} growths, in one of which layers moved or gains were "
                "rescaled, so that they cannot be folded back at once; check each growth against its own source"
            )
        if self.layers.new:
            source = deepened(source, architecture, self.layers)
        return with_gains(source, architecture, self.before.hidden, self.maps.common.of("hidden", None).size)


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
        "head_dim": (before.head_dim, after.head_dim),
    }
    problems = [f"{what} {a} and {b}" for what, (a, b) in fixed.items() if a != b]
    if problems:
        raise CompareError(
            f"{source.directory} and {grown.directory} have {', '.join(problems)}, which growth never changes"
        )
    found = ancestry_from(grown.directory, before, after, untied=untied)
    if found is None:
        layers = Layers.unchanged(after.num_layers)
        return Lineage(before, inferred_maps(before, after), layers, 1, repairs=False, origin="config.json")
    _require_possible(grown, architectures[0], source, found)
    return Lineage(**vars(found), origin=RECORD_FILE)


def _require_possible(grown: Header, architecture: Architecture, source: Header, found: Ancestry) -> None:
    """Refuse a lineage that no weights could make a growth which preserves the function."""
    hidden, ffn = (found.maps.common.of(axis, None).num_fresh for axis in FEATURES)
    changes = {
        "layers that moved, which a sub-norm without a weight cannot make up for": (
            architecture.subln is None and bool(found.layers.moved)
        ),
        "fresh features, for which the eps of its norms cannot change": architecture.norm_eps is None and hidden > 0,
        "fresh FFN units, over which its activation averages": architecture.averages_ffn(source.config) and ffn > 0,
    }
    if wrong := [what for what, is_so in changes.items() if is_so]:
        raise CheckpointError(
            f"{grown.directory / RECORD_FILE}: its lineage has {', and '.join(wrong)}, so that it is none of a growth "
            f"that preserves the function; {WAYS_OUT}"
        )


def inferred_maps(before: Sizes, after: Sizes) -> GrowthMaps:
    """The maps of the growth by whole factors, or to a target ratio, that leads from one model's sizes to another's.

    Raises:
        CompareError: there is none, or no one.
    """
    old, new = before.heads, after.heads
    pairs = {
        "hidden": (before.hidden, after.hidden),
        "ffn": (before.ffn, after.ffn),
        "noise heads": (old.num_groups, new.num_groups),
        "KV groups": (old.num_kv_groups, new.num_kv_groups),
    }
    problems = [f"{axis} {a} to {b}" for axis, (a, b) in pairs.items() if b % a or b // a > MAX_COPIES]
    if before.num_layers != after.num_layers:
        problems.append(f"layers {before.num_layers} to {after.num_layers}")
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
    plain = {
        "hidden": IndexMap.tile(before.hidden, after.hidden // before.hidden),
        "ffn": IndexMap.tile(before.ffn, after.ffn // before.ffn),
        "vocab": IndexMap.identity(before.vocab),
    }
    return GrowthMaps((axis_maps(heads, before.head_dim, plain),) * after.num_layers)
