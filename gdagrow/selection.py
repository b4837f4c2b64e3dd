"""Which signal heads a target ratio clones once more than others: the first, those that add most, or a user's choice.

A ratio that is no multiple of the source's cannot clone all heads of a group alike: 4:1 from 3:1 clones one head of
three. Any choice preserves the function; docs/selection.md says how `norm` ranks heads, and the format of a file.
"""

from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdagrow.archs import Architecture, Sizes
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.header import Header
from gdagrow.heads import HeadCopies, HeadGrowth, Heads, Ratio, first_copies, grow_heads
from gdagrow.plain_yaml import read_yaml
from gdagrow.recipe import Recipe

if TYPE_CHECKING:  # only `norm` reads weights
    from torch import Tensor

    from gdagrow.reading import RowReader

# The rows of a table that a head writes to the residual stream through: its columns, and the weight of its sub-norm.
_WRITER: Final = "hidden <- (group signal 2 head_dim)"
_SUBNORM: Final = "(2 head_dim)"

_CHUNK_WEIGHTS: Final = 2**20  # read at a time, 8 MB in float64

_EVERY_LAYER: Final = "*"


def grown_heads_by_layer(
    header: Header, architecture: Architecture, sizes: Sizes, recipe: Recipe
) -> tuple[HeadGrowth, ...]:
    """How the heads of every layer grow; one object for all layers whose heads grow alike.

    Args:
        header: The checkpoint, with the source's own layers; its weights are read for `select: norm` alone.
        architecture: Its table.
        sizes: Of its config.
        recipe: What the user asks for.

    Raises:
        PlanError: the heads cannot grow so (`grow_heads`), or the selection file does not fit (`choose`).
        RecipeError: the selection file cannot be read.
        CheckpointError: the weights cannot be read, or not be ranked.
    """
    signal, noise, kv = recipe.factor("signal"), recipe.factor("noise"), recipe.factor("kv")
    assert isinstance(noise, int), noise
    assert isinstance(kv, int), kv
    alike = grow_heads(sizes.heads, signal=signal, noise=noise, kv=kv)  # refuses before any weight is read
    chosen = None
    if isinstance(signal, Ratio) and recipe.select is not None:
        chosen = choose(header, architecture, sizes, signal.signal, recipe.select)
    if chosen is None:
        return (alike,) * sizes.num_layers
    grown = {
        copies: grow_heads(sizes.heads, signal=signal, noise=noise, kv=kv, copies=copies)
        for copies in dict.fromkeys(chosen)
    }
    return tuple(grown[copies] for copies in chosen)


def choose(
    header: Header, architecture: Architecture, sizes: Sizes, target: int, select: str
) -> tuple[HeadCopies, ...] | None:
    """Choose which signal heads stand more often than others in a group that grows to the ratio `target:1`.

    Args:
        header, architecture, sizes: The checkpoint, its table and its sizes.
        target: Signal heads in a group of the grown model, at least as many as in one of the source.
        select: `first`, `norm` or `given:FILE`, as in a recipe.

    Returns:
        For each layer how often each head stands in a copy of its group, which sums up to `target`; None where there
        is nothing to choose: for `first`, and for `norm` where the ratio is a multiple of the source's.

    Raises:
        RecipeError: the file cannot be read.
        PlanError: the file does not fit the checkpoint; names all that is wrong in it.
        CheckpointError: the weights cannot be read, or not be ranked because they are not finite.
    """
    if select.startswith("given:"):
        return _given(Path(select.removeprefix("given:")), sizes, target)
    if select == "first" or target % sizes.heads.ratio == 0:
        return None
    norms = head_norms(header, architecture, sizes)
    return tuple(tuple(_largest_once_more(group, target) for group in layer) for layer in norms)


def _largest_once_more(norms: tuple[float, ...], target: int) -> tuple[int, ...]:
    """As even counts as make up `target`, of which the heads with the largest norms have one more."""
    ranked = sorted(range(len(norms)), key=lambda head: (-norms[head], head))
    by_rank = first_copies(len(norms), target)
    return tuple(by_rank[ranked.index(head)] for head in range(len(norms)))


def head_norms(header: Header, architecture: Architecture, sizes: Sizes) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """How much every signal head adds to the residual stream: `norms[layer][group][head]`.

    It is the Frobenius norm of `o_proj[:, head] diag(subln.weight)`. The sub-norm gives a head's difference a
    root-mean-square of 1, so this is the root-mean-square length of what the head adds, for differences that point
    everywhere alike; the factor `1 - lambda_init` is the same for all heads of a layer and left out. Where the sub-norm
    has no weight, as in DiffLlama, it counts as 1.

    Raises:
        CheckpointError: the weights cannot be read, or are not finite.
    """
    from gdagrow.reading import open_reader  # imports torch, which most plans do without

    names = {row.notation: row.name for row in architecture.table(header.config)}
    with open_reader(header) as reader:
        return tuple(
            _layer_norms(reader, header, sizes, names[_WRITER], names.get(_SUBNORM), layer)
            for layer in range(sizes.num_layers)
        )


def _layer_norms(
    reader: "RowReader", header: Header, sizes: Sizes, writer: str, subnorm: str | None, layer: int
) -> tuple[tuple[float, ...], ...]:
    heads, name = sizes.heads, writer.format(layer=layer)
    squares = _column_squares(reader, name, *header.tensors[name].shape).view(-1, 2 * sizes.head_dim)
    if subnorm is not None:
        squares = squares * reader.tensor(subnorm.format(layer=layer)).double().square()
    norms = [sqrt(square) for square in _sum_of_rows(squares.T).tolist()]
    if not all(norm < float("inf") for norm in norms):
        raise CheckpointError(
            f"{header.directory}: {name} or the weight of its sub-norm has values that are not finite, or too large to "
            "be squared, so its heads cannot be ranked by norm; repair it, or choose with select first or given:FILE"
        )
    return tuple(tuple(norms[group * heads.ratio : (group + 1) * heads.ratio]) for group in range(heads.num_groups))


def _column_squares(reader: "RowReader", name: str, num_rows: int, num_columns: int) -> "Tensor":
    """The sum of the squares of each column, in float64."""
    step, squares = max(1, _CHUNK_WEIGHTS // num_columns), None
    for begin in range(0, num_rows, step):
        added = _sum_of_rows(reader.rows(name, begin, min(begin + step, num_rows)).double().square())
        squares = added if squares is None else squares + added
    assert squares is not None, name
    return squares


def _sum_of_rows(rows: "Tensor") -> "Tensor":
    """Add rows half onto half: in one order, which torch's own sum does not promise, so that all machines rank alike.

    Returns the sum, without the first dimension.
    """
    while len(rows) > 1:
        half, odd = divmod(len(rows), 2)
        folded = rows[:half] + rows[half : 2 * half]
        if odd:
            folded[0] += rows[-1]
        rows = folded
    return rows[0]


def _given(path: Path, sizes: Sizes, target: int) -> tuple[HeadCopies, ...]:
    """The choice in a YAML file: `layers:`, a mapping from a layer or `"*"` to counts (see docs/selection.md)."""
    origin = f"selection {path}"
    values = read_yaml(path, origin)
    layers = values.get("layers") if isinstance(values, dict) and list(values) == ["layers"] else None
    if not isinstance(layers, dict):
        raise PlanError(
            f"{origin}: expected the one key layers, which leads from layers to counts of heads, got {values!r:.80}; "
            "docs/selection.md has the format"
        )
    problems = list(_misplaced(layers, sizes.num_layers))
    read: dict[Any, HeadCopies] = {}
    for layer, value in layers.items():
        read[layer] = _counts(f"layer {layer}", value, sizes.heads, target, problems)
    if problems:
        raise PlanError(f"{origin}: {'; '.join(problems)}; docs/selection.md has the format")
    return tuple(read.get(layer, read.get(_EVERY_LAYER, ())) for layer in range(sizes.num_layers))


def _misplaced(layers: Mapping[Any, Any], num_layers: int) -> Iterator[str]:
    known = {_EVERY_LAYER, *range(num_layers)}
    for layer in layers:
        if layer not in known or isinstance(layer, bool | float):
            yield f'layer {layer!r}: no layer of the source, expected 0 to {num_layers - 1}, or "*" for all others'
    missing = [layer for layer in range(num_layers) if layer not in layers]
    if missing and _EVERY_LAYER not in layers:
        yield f'no counts for layer {", ".join(map(str, missing))}; add them, or "*" for all others'


def _counts(where: str, value: Any, heads: Heads, target: int, problems: list[str]) -> HeadCopies:
    """Read the counts of a layer's groups, one list for all or one for each; what is wrong goes into `problems`."""
    by_group = isinstance(value, list) and any(isinstance(item, list) for item in value)
    if by_group and len(value) != heads.num_groups:
        problems.append(f"{where}: expected a list of counts for each of {heads.num_groups} groups, got {len(value)}")
    read = value if by_group else [value]
    for group, counts in enumerate(read):
        whole = isinstance(counts, list) and all(type(count) is int and count >= 1 for count in counts)
        if not whole or len(counts) != heads.ratio or sum(counts) != target:
            place = f"{where}, group {group}" if by_group else where
            problems.append(
                f"{place}: expected {heads.ratio} counts of 1 or more with the sum {target}, got {counts!r:.80}"
            )
    return () if problems else tuple(map(tuple, read if by_group else read * heads.num_groups))
