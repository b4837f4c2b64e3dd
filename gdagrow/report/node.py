"""A value of the report's JSON that knows its path, so that a page can say of each figure where it stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """A value and its path from the top: `grown.0.comparison.max_rel`."""

    value: Any
    path: str = ""

    def __getitem__(self, key: str | int) -> "Node":
        return Node(self.value[key], f"{self.path}.{key}" if self.path else str(key))

    def at(self, path: str) -> "Node":
        """The value at a path from here, `figures.heads.ratio`."""
        node = self
        for key in path.split("."):
            node = node[key]
        return node

    def __iter__(self) -> Iterator["Node"]:
        """The items of a list, or the values of an object, in order."""
        keys = self.value if isinstance(self.value, dict) else range(len(self.value))
        return (self[key] for key in keys)

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        return self.value is not None

    @property
    def key(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]
