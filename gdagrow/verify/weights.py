"""The certificate: a grown checkpoint folded back onto its source, weight by weight; no model is run."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gdagrow.archs import architecture_of
from gdagrow.axes import parse
from gdagrow.errors import CompareError
from gdagrow.row_files import open_rows
from gdagrow.rows import grown_rows
from gdagrow.verify.lineage import Lineage, lineage_of
from gdagrow.verify.pair import HeaderPair, read_pair
from gdagrow.verify.settings import Setting, other_settings
from gdagrow.verify.tensors import Folded, Folder, Pair, Place, PlaceKey, add_places
from gdagrow.views.deeper import copies_are_free


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that does not fold back onto its source.

    problem: Why it cannot be folded at all (missing, another dtype), or None.
    num_wrong: Copies that are not the source's bits, and sums of parts that are not its weights.
    largest: The largest distance of one of them from the source; infinite where something is not finite.
    places: The first of them in each of the first few heads, or rows where the tensor has no heads.
    """

    name: str
    problem: str | None
    num_wrong: int = 0
    largest: float = 0.0
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Certificate:
    """Whether a grown checkpoint holds its source, exactly.

    equivalent: Whether every tensor folds back and no setting differs: the models then are the same function.
    maps: Where the index maps come from: `growth.json` or `config.json`.
    num_tensors, num_elements: Grown tensors and weights that were held against the source.
    differences: The tensors that differ, in order.
    settings: Keys of the configs that differ and may change the function.
    """

    equivalent: bool
    maps: str
    num_tensors: int
    num_elements: int
    differences: tuple[TensorDifference, ...]
    settings: tuple[Setting, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a distance that is not finite becomes None."""
        content = asdict(self)
        for difference in content["differences"]:
            if not math.isfinite(difference["largest"]):
                difference["largest"] = None
        return content


def check_weights(source: Path, grown: Path, *, progress: Callable[[int], None] | None = None) -> Certificate:
    """Show that every tensor of a grown checkpoint folds back onto its source, bit for bit and in bounded memory.

    What is gathered must be the source's bits in every copy; what is split must sum to the source's weight, in exact
    arithmetic. With maps that preserve the function, that makes the models the same function.

    Args:
        source, grown: Checkpoint directories.
        progress: Called with the number of bytes of grown weights checked since its last call.

    Raises:
        CheckpointError: a checkpoint or `growth.json` cannot be read, or does not fit.
        CompareError: the models differ in what growth never changes, or no maps lead from one to the other.
    """
    headers = read_pair(source, grown)
    before, after = (architecture_of(header.config).sizes(header.config) for header in headers)
    tied = [architecture_of(header.config).is_tied(header.config) for header in headers]
    try:
        lineage = lineage_of(*headers, untied=tied[0] and not tied[1])
        headers = lineage.seen(headers[0]), headers[1]
    except CompareError as error:
        raise CompareError(
            f"weights cannot be folded back: {error}; what the models compute over the same vocabulary can be "
            "compared: gdagrow diff without --weights"
        ) from None
    pairs, differences = _pairs(headers, lineage)
    wrong: dict[str, _Wrong] = {}
    with open_rows(headers[0]) as old, open_rows(headers[1]) as new:
        for folded in Folder(old, new, before, after).fold(pairs):
            if folded.num_wrong:
                wrong.setdefault(folded.name, _Wrong()).add(folded)
            if progress:
                progress(folded.num_bytes)
    differences += [TensorDifference(name, None, w.num_wrong, w.largest, tuple(w.places.values()))
                    for name, w in wrong.items()]  # fmt: skip
    settings = other_settings(headers[0].config, headers[1].config)
    return Certificate(
        equivalent=not differences and not settings, maps=lineage.origin,
        num_tensors=len(pairs), num_elements=sum(pair.grown.num_elements for pair in pairs),
        differences=tuple(differences), settings=settings,
    )  # fmt: skip


@dataclass
class _Wrong:
    """What is wrong with one tensor so far."""

    num_wrong: int = 0
    largest: float = 0.0
    places: dict[PlaceKey, Place] = field(default_factory=dict)

    def add(self, folded: Folded) -> None:
        self.num_wrong += folded.num_wrong
        self.largest = max(self.largest, folded.largest)
        add_places(self.places, folded.places)


def _pairs(headers: HeaderPair, lineage: Lineage) -> tuple[list[Pair], list[TensorDifference]]:
    """Each grown tensor with its source, and what has no counterpart."""
    source, grown = headers
    architecture = architecture_of(source.config)
    num_layers, tied = len(lineage.layers.source), architecture.is_tied(grown.config)
    rows = list(grown_rows(source, architecture, num_layers, tied_after=tied))
    pairs, problems = [], []
    for row in rows:
        old, new = source.tensors[row.source], grown.tensors.get(row.name)
        if new is None:
            problems.append(TensorDifference(row.name, "missing from the grown checkpoint"))
        elif new.dtype != old.dtype:
            problems.append(TensorDifference(row.name, f"stored as {new.dtype}, in the source as {old.dtype}"))
        else:
            free = copies_are_free(row.parameter, row.layer, lineage.layers)
            pairs.append(Pair(old, new, parse(row.notation), row.growth(lineage.maps), free))
    unknown = grown.tensors.keys() - {row.name for row in rows}
    return pairs, problems + [TensorDifference(name, "nothing in the source grows into it") for name in sorted(unknown)]
