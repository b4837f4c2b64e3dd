"""How a model grows in depth: where new blocks stand between the source's, and of which layer each is a copy."""

import re
from dataclasses import dataclass
from typing import Literal

from gdagrow.errors import PlanError, RecipeError


@dataclass(frozen=True)
class Placement:
    """Where new blocks go: spread `even`ly, at the `top` (the end), at the `bottom`, or `after` layers of the source.

    layers: For `after`, the source's layer behind which each new block stands, ascending; one may occur again.
    """

    where: Literal["even", "top", "bottom", "after"]
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"after:{','.join(map(str, self.layers))}" if self.where == "after" else self.where


EVEN = Placement("even")


def parse_placement(text: str) -> Placement:
    """Read `even`, `top`, `bottom` or `after:3,7,11`.

    Raises:
        RecipeError: it is none of these.
    """
    if text in ("even", "top", "bottom"):
        return Placement(text)  # type: ignore[arg-type]
    found = re.fullmatch(r"after: *([0-9]{1,6}(?: *, *[0-9]{1,6})*) *", text)
    if not found:
        raise RecipeError(f"expected even, top, bottom or after:3,7,11 (layers of the source, from 0), got {text!r}")
    return Placement("after", tuple(sorted(map(int, found.group(1).split(",")))))


@dataclass(frozen=True)
class Layers:
    """The layers of a grown model.

    source: For each of its layers the source's layer that it is, or that it is a copy of.
    new: Which of its layers are new blocks.
    """

    source: tuple[int, ...]
    new: frozenset[int] = frozenset()

    @staticmethod
    def unchanged(num_layers: int) -> "Layers":
        return Layers(tuple(range(num_layers)))

    @property
    def moved(self) -> frozenset[int]:
        """The old layers that have another index now."""
        return frozenset(i for i, source in enumerate(self.source) if i != source and i not in self.new)


def place_blocks(num_layers: int, more: int, placement: Placement) -> Layers:
    """Put new blocks between layers: each is a copy of the layer before it, at the bottom of the one after it.

    Args:
        num_layers: Of the source.
        more: How many new blocks.
        placement: Where. `even` puts block `i` of `more` behind the first `(i + 1) / more` of the layers, rounded up.

    Raises:
        PlanError: a layer to stand behind is not there, or there are more or fewer of them than blocks.
    """
    if placement.where == "bottom":
        return Layers((0,) * more + tuple(range(num_layers)), frozenset(range(more)))
    if placement.where == "after":
        behind = list(placement.layers)
        missing = sorted(layer for layer in set(behind) if layer >= num_layers)
        if missing:
            raise PlanError(
                f"insert {placement}: the source has no layer {', '.join(map(str, missing))}, expected 0 to "
                f"{num_layers - 1}"
            )
        if len(behind) != more:
            raise PlanError(
                f"insert {placement}: it places {len(behind)} new blocks and {more} are asked for; name a layer for "
                "each, or leave the number out"
            )
    elif placement.where == "top":
        behind = [num_layers - 1] * more
    else:
        # Rounded up: of fewer layers than blocks, each then has as many behind it, or one more.
        behind = [-(-(i + 1) * num_layers // more) - 1 for i in range(more)]
    source, new = [], set()
    for layer in range(num_layers):
        source.append(layer)
        for _ in range(behind.count(layer)):
            new.add(len(source))
            source.append(layer)
    return Layers(tuple(source), frozenset(new))
