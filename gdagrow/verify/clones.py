"""How like the copies of a grown checkpoint still are: cosine and distance of each to the first, from the lineage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor

from gdagrow.archs import Sizes, architecture_of
from gdagrow.axes import Expression, IndexMap, parse
from gdagrow.checkpoint import read_checkpoint
from gdagrow.errors import CheckpointError, CompareError
from gdagrow.formats.links import require_inside
from gdagrow.growth import copies_of
from gdagrow.reading import RowReader, open_reader
from gdagrow.record import RECORD_FILE
from gdagrow.rows import GrownRow, claim, grown_rows
from gdagrow.verify.ancestry import whole_ancestry
from gdagrow.verify.places import axis_at, head_at

# Weights of one copy that are compared at a time, in a few float64 tensors.
CHUNK_WEIGHTS: Final = 2**18
# Weights in whole rows that are mapped at a time, to compare columns of them.
MAPPED_WEIGHTS: Final = 2**22

Progress = Callable[[str], None]


@dataclass(frozen=True)
class HeadSimilarity:
    """The copies of one head against the first of them, on average.

    head: The source's head: `signal head 2 of group 0`, `noise head of group 1`, `KV group 3`.
    """

    head: str
    cosine: float
    relative_distance: float


@dataclass(frozen=True)
class CloneSimilarity:
    """The copies in one tensor along one axis against the first copy of the same indices; means over all copies.

    name: The tensor.
    layer: Its layer, or None outside the layers.
    parameter: Its row of the architecture's table, with `{layer}`.
    axis: `signal`, `noise`, `kv`, `hidden` or `ffn`.
    written: Whether the layer writes the axis, so that growth made exact copies; else it reads it, and these are parts
        of a split.
    cosine: 1 for the same direction.
    relative_distance: `2 |a - b| / (|a| + |b|)`: 0 only for equal copies, 2 for opposite ones.
    heads: Each head that has copies, for axes of heads; else empty.
    """

    name: str
    layer: int | None
    parameter: str
    axis: str
    written: bool
    cosine: float
    relative_distance: float
    heads: tuple[HeadSimilarity, ...]


@dataclass(frozen=True)
class Clones:
    """The copies in every tensor that has some; `lineage` is the file that says which they are."""

    lineage: str
    tensors: tuple[CloneSimilarity, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def clone_similarity(
    checkpoint: Path, *, lineage: Path | None = None, progress: Progress | None = None
) -> Clones | None:
    """Measure how like its copies a grown checkpoint still holds, a few chunks of rows in memory at a time.

    Each copy is held against the first one of the same old index, through all the growths of the lineage. What makes up
    a copy is all that a tensor holds of one head, and on the axes `hidden` and `ffn` all that it holds of the axis.

    Args:
        checkpoint: Its directory; it may have been trained since it was grown.
        lineage: Its `growth.json`, or a directory with it, if the checkpoint has lost its own.
        progress: Told what is being read.

    Returns:
        None if no lineage is given and the checkpoint has none: nothing says that it was grown.

    Raises:
        CheckpointError: the checkpoint or the lineage cannot be read, or the lineage is of other sizes.
        CompareError: copies hold weights that are not finite.
    """
    header, path = read_checkpoint(checkpoint), _lineage_file(checkpoint, lineage)
    if path is None:
        return None
    architecture = architecture_of(header.config)
    after = architecture.sizes(header.config)
    claim(header, architecture, after)
    ancestry = whole_ancestry(path, after)
    maps, before = ancestry.maps, ancestry.before
    # The same for most layers.
    of_growth: dict[int, list[list[Piece]]] = {}
    found: list[CloneSimilarity] = []
    with open_reader(header) as reader:
        for row in grown_rows(header, architecture, after.num_layers, tied_after=architecture.is_tied(header.config)):
            if progress:
                progress(f"copies in {row.name}")
            notation, growth = parse(row.notation), row.growth(maps)
            if id(growth) not in of_growth:
                of_growth[id(growth)] = [
                    list(pieces(dim, index_map, before))
                    for dim, index_map in zip(notation.dims, growth.dims, strict=True)
                ]
            shape = header.tensors[row.name].shape
            for dim, (of_dim, reads) in enumerate(zip(of_growth[id(growth)], notation.reads, strict=True)):
                chunks = (_columns if dim else _rows)(reader, row.name, shape, of_dim)
                for axis, copies in _compare(chunks).items():
                    found.append(_similarity(checkpoint, row, axis, not reads, copies))
    return Clones(str(path), tuple(found))


def _lineage_file(checkpoint: Path, lineage: Path | None) -> Path | None:
    if lineage is None:
        return checkpoint / RECORD_FILE if require_inside(checkpoint, checkpoint / RECORD_FILE).exists() else None
    path = lineage / RECORD_FILE if lineage.is_dir() else lineage
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a {RECORD_FILE} or a directory that has one as the lineage")
    return path


@dataclass(frozen=True)
class Piece:
    """Consecutive indices that have copies, all of one head if the axis has heads, and where each copy starts."""

    axis: str
    head: str
    length: int
    starts: tuple[int, ...]


def pieces(dim: Expression, index_map: IndexMap, before: Sizes) -> Iterator[Piece]:
    """What has copies along a dimension of a tensor, by its notation, its map and the sizes of the source."""
    for segments in copies_of(index_map):
        if len(segments) == 1:
            continue
        old, length = segments[0].old, segments[0].length
        # Heads are copied whole, but one segment may span several.
        step = before.head_dim if head_at(dim, before.axes, old) else length
        for offset in range(0, length, step):
            place = dim, before.axes, old + offset
            yield Piece(axis_at(*place), head_at(*place), step, tuple(segment.new + offset for segment in segments))


# A piece, and some of the weights of each of its copies.
_Chunk = tuple[Piece, list[Tensor]]


def _rows(reader: RowReader, name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Iterator[_Chunk]:
    step = max(1, CHUNK_WEIGHTS // (shape[1] if len(shape) == 2 else 1))
    for piece in pieces:
        for begin in range(0, piece.length, step):
            end = min(begin + step, piece.length)
            yield piece, [reader.rows(name, start + begin, start + end) for start in piece.starts]


def _columns(reader: RowReader, name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Iterator[_Chunk]:
    if not pieces:
        return
    num_rows, mapped = shape[0], max(1, MAPPED_WEIGHTS // shape[1])
    for top in range(0, num_rows, mapped):
        rows = reader.rows(name, top, min(top + mapped, num_rows))
        for piece in pieces:
            step = max(1, CHUNK_WEIGHTS // piece.length)
            for begin in range(0, len(rows), step):
                yield piece, [rows[begin : begin + step, start : start + piece.length] for start in piece.starts]


def _compare(chunks: Iterator[_Chunk]) -> dict[str, dict[str, Tensor]]:
    """By axis and head, `a . b`, `a . a`, `b . b` and `|a - b|^2` of each copy but the first: float64 `[copies, 4]`."""
    found: dict[str, dict[str, Tensor]] = {}
    for piece, (first, *others) in chunks:
        one = first.double().flatten()
        sums = [inner_products(one, other.double().flatten()) for other in others]
        heads = found.setdefault(piece.axis, {})
        heads[piece.head] = heads.get(piece.head, 0.0) + torch.stack(sums)
    return found


def inner_products(one: Tensor, two: Tensor) -> Tensor:
    """`a . b`, `a . a`, `b . b` and `|a - b|^2` along the last dimension: `[..., 4]`."""
    apart = one - two
    pairs = ((one, two), (one, one), (two, two), (apart, apart))
    return torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs], dim=-1)


def _similarity(
    checkpoint: Path, row: GrownRow, axis: str, written: bool, copies: dict[str, Tensor]
) -> CloneSimilarity:
    if not all(bool(sums.isfinite().all()) for sums in copies.values()):
        raise CompareError(
            f"{checkpoint}: {row.name} has copies with weights that are not finite, which cannot be compared; "
            "give a checkpoint from before they went wrong"
        )
    alike = {head: [cosine_and_distance(*of_copy) for of_copy in sums.tolist()] for head, sums in copies.items()}
    every = [pair for pairs in alike.values() for pair in pairs]
    heads = tuple(HeadSimilarity(head, *_means(pairs)) for head, pairs in alike.items() if head)
    prefix, layered, suffix = row.parameter.name.partition("{layer}")
    layer = int(row.name.removeprefix(prefix).removesuffix(suffix)) if layered else None
    return CloneSimilarity(row.name, layer, row.parameter.name, axis, written, *_means(every), heads)


def cosine_and_distance(product: float, one: float, two: float, apart: float) -> tuple[float, float]:
    """The figures of `CloneSimilarity` for two copies, from their `inner_products`."""
    # Of equal copies every difference is 0 exactly, and of others no square of one vanishes in float64 (but below
    # 1e-162, far under any weight's rounding): so only they are told as equal, whatever rounding does to the cosine.
    if apart == 0:
        return 1.0, 0.0
    lengths = sqrt(one), sqrt(two)
    cosine = product / (lengths[0] * lengths[1]) if all(lengths) else 0.0
    return max(-1.0, min(1.0, cosine)), 2 * sqrt(apart) / sum(lengths)


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    cosines, distances = zip(*pairs, strict=True)
    return fmean(cosines), fmean(distances)
