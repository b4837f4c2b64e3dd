"""A checkpoint seen as another one: tensors by other names, in another order of rows, zero, or made from others.

A growth goes on from a view as from any header, and `gdagrow.reading` reads it; nothing is written in between. Views of
views are fine: a conversion, then more layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gdagrow.axes import IndexMap
from gdagrow.header import ITEM_BYTES, Header, TensorInfo


@dataclass(frozen=True)
class Seen:
    """A tensor that lies under the view as `name`, with its rows in the order of a map if there is one.

    anew: Why it has no past of its own, if it is a copy beside the tensor that it is a copy of.
    """

    name: str
    rows: IndexMap | None = None
    anew: str | None = None


@dataclass(frozen=True)
class Zeros:
    """Zeros in the form of a tensor that lies under the view as `like`; `anew` as in `Seen`."""

    like: str
    anew: str


@dataclass(frozen=True)
class Made:
    """A small tensor of one dimension, made in float64, which a shorter dtype would round.

    size: How many numbers it has.
    names: The tensors under the view that it is made from.
    make: Makes its values from theirs.
    like: The one of these in whose place it stands, None if there is none.
    because: Why it is made.
    factor: What that one was multiplied by, if that is all that was done; else its moments are not those of this one.
    """

    size: int
    names: tuple[str, ...]
    make: Callable[..., Sequence[float]]
    like: str | None
    because: str
    factor: float | None = None


Derived = Seen | Zeros | Made


@dataclass(frozen=True, kw_only=True)
class View(Header):
    """A header that shows the one under it in another way.

    Of a tensor's place in a file nothing has a meaning but the number of its bytes.

    under: What is seen so.
    derived: How each tensor comes about.
    """

    under: Header
    derived: Mapping[str, Derived]

    @property
    def stored(self) -> Header:
        return self.under.stored

    @property
    def shards(self) -> tuple[str, ...]:
        return self.under.shards

    @property
    def shard_bytes(self) -> Mapping[str, int]:
        return self.under.shard_bytes


def view(under: Header, config: Mapping[str, Any], derived: Mapping[str, Derived]) -> View:
    """See a header as one with another config, whose tensors come about as `derived` says, in its order."""
    tensors = {name: _form(under, name, how) for name, how in derived.items()}
    return View(under.directory, config, tensors, under.metadata, under=under, derived=derived)


def _form(under: Header, name: str, how: Derived) -> TensorInfo:
    if isinstance(how, Made):
        return TensorInfo(name, "F64", (how.size,), "", 0, ITEM_BYTES["F64"] * how.size)
    like = under.tensors[how.name if isinstance(how, Seen) else how.like]
    return replace(like, name=name, shard="", start=0, stop=like.stop - like.start)


@dataclass(frozen=True)
class Origin:
    """What a tensor of a header is, through all its views.

    name: The stored tensor that it is, or in whose place it stands; None if there is none.
    rows: The order in which its rows are stored, if it is another.
    factor: What its values were multiplied by.
    anew: Why the moments of that tensor are not its own, or None.
    is_zero: Whether it is all zeros, because a view says so.
    """

    name: str | None
    rows: IndexMap | None = None
    factor: float = 1.0
    anew: str | None = None
    is_zero: bool = False


def origin_of(header: Header, name: str, below: Header | None = None) -> Origin:
    """Find out what a tensor of a header is, in what is stored, or in the header `below` all views that count."""
    if header is below or not isinstance(header, View):
        return Origin(name)
    how = header.derived[name]
    under = how.name if isinstance(how, Seen) else how.like
    found = Origin(None) if under is None else origin_of(header.under, under, below)
    if isinstance(how, Made):
        anew = found.anew if how.factor else how.because
        return replace(found, anew=anew, factor=(how.factor or 1.0) * found.factor)
    anew = how.anew or found.anew
    if isinstance(how, Seen):
        assert how.rows is None or found.rows is None, f"the rows of {name} are reordered twice"
        return replace(found, rows=how.rows or found.rows, anew=anew)
    return replace(found, anew=anew, is_zero=True)


def why_float64(header: Header, name: str) -> str | None:
    """Why a tensor is made, in float64, if what stands for it under all views is stored in another dtype."""
    if not isinstance(header, View):
        return None
    how = header.derived[name]
    if isinstance(how, Made):
        origin = origin_of(header, name)
        same = origin.name is not None and header.stored.tensors[origin.name].dtype == "F64"
        return None if same else how.because
    return why_float64(header.under, how.name) if isinstance(how, Seen) else None
