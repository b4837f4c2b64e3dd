"""The rows of an architecture's table that a checkpoint's tensors stand in, and those that they grow into."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gdagrow.archs import Architecture, Parameter, Sizes, Trained, in_model_order
from gdagrow.axes import parse
from gdagrow.errors import CheckpointError
from gdagrow.growth import GrowthMaps, TensorGrowth
from gdagrow.header import Header, TensorInfo
from gdagrow.views import origin_of

GROWABLE_DTYPES = ("F64", "F32", "BF16", "F16")


def claim(header: Header, architecture: Trained, sizes: Sizes) -> dict[str, Parameter]:
    """Give every stored tensor its one row of the table.

    Returns:
        Tensor name to row, in the table's order, layer by layer.

    Raises:
        CheckpointError: names every tensor that is missing, unknown, misshapen or of a dtype that cannot be grown.
    """
    present = {p for p in architecture.table(header.config) if not p.optional or _is_stored(p, header)}
    claimed: dict[str, Parameter] = {}
    for parameter, layer in in_model_order(architecture.table(header.config), sizes.num_layers):
        if parameter in present:
            claimed[parameter.name.format(layer=layer)] = parameter
    problems = [f"missing {name}" for name in claimed if name not in header.tensors]
    problems += [f"unknown {name}{_oddity(info)}" for name, info in header.tensors.items() if name not in claimed]
    for name, parameter in claimed.items():
        info, expected = header.tensors.get(name), parameter.parsed.shape(sizes.axes)
        if info and info.shape != expected:
            problems.append(f"{name} has shape {list(info.shape)}, expected {list(expected)} ({parameter.notation})")
        if info and info.dtype not in GROWABLE_DTYPES:
            problems.append(f"{name} is stored as {info.dtype}, expected one of {', '.join(GROWABLE_DTYPES)}")
    if problems:
        raise CheckpointError(
            f"{header.directory}: {len(problems)} tensors do not fit the {architecture.name} table at the sizes in "
            "config.json: " + "; ".join(problems)
        )
    return claimed


def _oddity(info: TensorInfo) -> str:
    """What a tensor that belongs nowhere may be of: a quantised weight's scale."""
    return "" if info.dtype in GROWABLE_DTYPES else f" ({info.dtype})"


def _is_stored(parameter: Parameter, header: Header) -> bool:
    if not parameter.is_layered:
        return parameter.name in header.tensors
    prefix, suffix = parameter.name.split("{layer}")
    return any(name.startswith(prefix) and name.endswith(suffix) for name in header.tensors)


@dataclass(frozen=True)
class GrownRow:
    """One tensor of a grown checkpoint.

    name, source: It, and the source's tensor.
    parameter: Its row of the table.
    layer: The layer that it stands in; 0 for one outside the layers.
    notation: Its dimensions in the grown model.
    """

    name: str
    source: str
    parameter: Parameter
    layer: int
    notation: str

    def growth(self, maps: GrowthMaps) -> TensorGrowth:
        """How it grows, where the axes do as `maps` say."""
        return maps.growth(self.notation, self.layer, is_gain=self.parameter.part == "norm")


def grown_rows(header: Header, architecture: Architecture, num_layers: int, *, tied_after: bool) -> Iterator[GrownRow]:
    """Every tensor that a source of `num_layers` layers grows into; it fits its table (see `claim`)."""
    for parameter, layer in in_model_order(architecture.table(header.config), num_layers):
        name = parameter.name.format(layer=layer)
        if name in header.tensors:
            # A tied head cannot be split, for its tensor is the embedding too: the norm that feeds it is split instead.
            carries_split = tied_after and name == architecture.last_norm
            yield GrownRow(name, name, parameter, layer, "<- hidden" if carries_split else parameter.notation)
    if architecture.is_tied(header.config) and not tied_after:
        head = next(p for p in architecture.table({**header.config, "tie_word_embeddings": False})
                    if p.name == architecture.head)  # fmt: skip
        yield GrownRow(head.name, architecture.embedding, head, 0, head.notation)


def why_moments_are_lost(
    row: GrownRow, header: Header, architecture: Architecture, maps: GrowthMaps, *, untied: bool
) -> str | None:
    """Why the optimizer moments of a grown tensor cannot be carried exactly, or None where they can.

    `header`: What is grown, of which the row's source is a tensor; `untied`: whether the source's embeddings are tied
    and the grown model's are not.
    """
    origin = origin_of(header, row.source)
    if origin.anew is not None:
        return origin.anew
    if untied and row.name == architecture.embedding:
        return "its tied gradient was that of two parameters"
    if untied and row.name == architecture.head:
        return "it is new: the source's head was tied to the embedding"
    axes = parse(row.notation)
    unequal = sorted(maps.by_layer[row.layer].unequal & axes.axes(read=False))
    return f"copies along {', '.join(unequal)} serve unequal shares of what they served" if unequal else None


def told_by_row(reasons: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Reasons by row of the table, for those that have any; with the layers where layers differ.

    `reasons`: for each tensor in model order its row, and its reason or None.
    """
    of_row: dict[str, list[str | None]] = {}
    for row, reason in reasons:
        of_row.setdefault(row, []).append(reason)
    return {row: _told(of_layer) for row, of_layer in of_row.items() if any(of_layer)}


def _told(of_layer: list[str | None]) -> str:
    found = list(dict.fromkeys(reason for reason in of_layer if reason))
    if len(set(of_layer)) == 1:
        return found[0]
    layers = {reason: [str(layer) for layer, other in enumerate(of_layer) if other == reason] for reason in found}
    return "; ".join(f"{reason} (layer{'s' * (len(at) > 1)} {', '.join(at)})" for reason, at in layers.items())
