"""Read a pickle as data: its opcodes give a tree of plain values, and nothing in it is imported, called or built.

A pickle is a program. This reads the few instructions that data need, refuses every other, and leaves what the
program would call as a `Made` node that says what it asked for. Source: the opcodes' definitions in Python's
`pickletools`.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from gdagrow.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle asks for, such as `torch.float32`; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What the pickle would have made by calling `function` with `args` and then giving it `state`, or items."""

    function: Global
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """What the pickle leaves to its reader, by an id: in torch's files a storage."""

    id: Any


_ORDERED: Final = Global("collections", "OrderedDict")


class PickleRefusedError(ValueError):
    """The bytes are no pickle of plain data, or ask for a name that is not admitted."""


def parse(raw: bytes, admitted: Collection[tuple[str, str]]) -> Any:
    """Read one pickle.

    Args:
        raw: All of it.
        admitted: `(module, name)` of each name that it may ask for.

    Returns:
        None, bool, int, float, str, bytes, tuple, list, dict (keys are str, int or `Made`), `Global`, `Made` or
        `Persistent`, nested as in the pickle.

    Raises:
        PickleRefusedError: as the class says; the message tells which.
    """
    try:
        return _Machine(raw, admitted).run()
    except PickleRefusedError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise PickleRefusedError("is damaged or holds more than plain data") from None


def refused(where: object, error: PickleRefusedError) -> CheckpointError:
    """The error of a file `where` whose pickle was refused."""
    return CheckpointError(f"{where}: its pickle {error}; nothing in it was run: restore the file")


class _Machine:
    """The pickle machine without its calls: a stack, marks in it, and a memo."""

    def __init__(self, raw: bytes, admitted: Collection[tuple[str, str]]) -> None:
        self._raw = raw
        self._at = 0
        self._admitted = admitted
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        raw, steps = self._raw, _STEPS
        while (opcode := raw[self._at]) != _STOP:
            self._at += 1
            steps[opcode](self)
        if self._below or len(self._stack) != 1:
            raise ValueError("stopped in the midst")
        return self._stack[0]

    def take(self, count: int) -> bytes:
        taken = self._raw[self._at : self._at + count]
        if len(taken) != count:
            raise IndexError("truncated")
        self._at += count
        return taken

    def number(self, form: struct.Struct) -> int:
        value: int = form.unpack_from(self._raw, self._at)[0]
        self._at += form.size
        return value

    def line(self) -> str:
        end = self._raw.index(b"\n", self._at)
        text = self._raw[self._at : end].decode("ascii")
        self._at = end + 1
        return text

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def text(self, form: struct.Struct) -> None:
        self._stack.append(str(self.take(self.number(form)), "utf-8", "surrogatepass"))

    def octets(self, form: struct.Struct) -> None:
        self._stack.append(self.take(self.number(form)))

    def long(self) -> None:
        self._stack.append(int.from_bytes(self.take(self.number(_U1)), "little", signed=True))

    def double(self) -> None:
        self._stack.append(struct.unpack(">d", self.take(8))[0])

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("too few for a tuple")
        self._stack[len(self._stack) - count :] = [tuple(self._stack[len(self._stack) - count :])]

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def append(self, items: list[Any]) -> None:
        values = self._stack[-1]
        if type(values) is not list:
            raise TypeError("append to no list")
        values += items

    def set_items(self, items: list[Any]) -> None:
        values = self._stack[-1]
        if type(values) is Made and values.function == _ORDERED and values.state is None:
            values.state = {}
        if type(values) is Made and values.function == _ORDERED:
            values = values.state
        if type(values) is not dict or len(items) % 2:
            raise TypeError("items for no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple nested deep enough would exhaust the machine's own stack when it is hashed.
            if type(key) not in (str, int, Made) or key in values:
                raise TypeError("a key that is no name, or one that comes twice")
            values[key] = value

    def ask(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name that is no text")
        if (module, name) not in self._admitted:
            raise PickleRefusedError(f"asks for {f'{module}.{name}'[:200]!r}, which no such file needs")
        self._stack.append(Global(module, name))

    def ask_from_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.ask(module, name)

    def make(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise TypeError("a call of what is no name")
        self._stack.append(Made(function, args))

    def build(self) -> None:
        state, made = self._stack.pop(), self._stack[-1]
        if type(made) is not Made or made.state is not None:
            raise TypeError("a state for what takes none")
        made.state = state

    def persistent(self) -> None:
        self._stack.append(Persistent(self._stack.pop()))


_U1, _U2, _U4, _I4, _U8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<i", "<Q"))
_STOP: Final = ord(".")
_STEPS: Final[dict[int, Callable[[_Machine], object]]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: only how far to read at once
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number(_I4)),
    ord("K"): lambda m: m.push(m.number(_U1)),
    ord("M"): lambda m: m.push(m.number(_U2)),
    0x8A: _Machine.long,
    ord("G"): _Machine.double,
    0x8C: lambda m: m.text(_U1),
    ord("X"): lambda m: m.text(_U4),
    0x8D: lambda m: m.text(_U8),
    ord("C"): lambda m: m.octets(_U1),
    ord("B"): lambda m: m.octets(_U4),
    0x8E: lambda m: m.octets(_U8),
    ord("("): _Machine.mark,
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.append([m._stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.set_items([m._stack.pop(-2), m._stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("q"): lambda m: m.remember(m.number(_U1)),
    ord("r"): lambda m: m.remember(m.number(_U4)),
    0x94: lambda m: m.remember(len(m._memo)),
    ord("h"): lambda m: m.recall(m.number(_U1)),
    ord("j"): lambda m: m.recall(m.number(_U4)),
    ord("c"): lambda m: m.ask(m.line(), m.line()),
    0x93: _Machine.ask_from_stack,
    ord("R"): _Machine.make,
    0x81: _Machine.make,  # NEWOBJ: the same for who calls nothing
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
