"""Read a small YAML file as plain values, with a bound on what a few lines of it can say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gdagrow.errors import RecipeError

_MAX_BYTES: Final = 2**18  # takes some seconds to be read; a long selection has a quarter of that
_MAX_DEPTH: Final = 100
_MAX_ALIASED: Final = 10_000  # values that stand where an alias does, taken together


def read_yaml(path: Path, origin: str) -> Any:
    """Read a YAML 1.2 file, in which `4:1` is text and a key stands once.

    Returns:
        None, bool, int of at most 64 bits, float, str, list and dict, nested.

    Raises:
        RecipeError: the file cannot be read or is no such YAML, is large or deep, or aliases (`*name`), by which a few
            lines can say billions of values, say too many; begins with `origin`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)  # a name may have a null in it
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        raise RecipeError(f"{origin}: cannot be read: {reason}") from None
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{origin}: expected at most {_MAX_BYTES:,} bytes, got more; give a shorter file")
    try:
        value = _load(text)
    except Exception as error:  # ruamel passes on whatever its constructors raise
        reason = " ".join(str(error).split()[:40])
        if isinstance(error, RecursionError) or reason.startswith("maximum depth"):
            reason = f"nested more than {_MAX_DEPTH} levels deep"
        raise RecipeError(f"{origin}: not YAML: {reason}") from None
    if not _is_plain(value):
        raise RecipeError(
            f"{origin}: expected numbers of at most 64 bits, texts, lists and mappings alone, got something else, such "
            "as a date; put texts into quotes"
        )
    return value


def _load(text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer, ComposerError

    class FewAliases(Composer):
        num_aliased = 0

        def return_alias(self, node: Any) -> Any:
            if node.end_mark is None:
                raise ComposerError(None, None, "an alias (*name) stands inside what it names", node.start_mark)
            for _ in _nodes(node):
                self.num_aliased += 1
                if self.num_aliased > _MAX_ALIASED:
                    told = f"aliases (*name) say more than {_MAX_ALIASED:,} values; write them out"
                    raise ComposerError(None, None, told, node.start_mark)
            return node

    loader = YAML(typ="safe", pure=True)
    loader.Composer, loader.max_depth = FewAliases, _MAX_DEPTH
    return loader.load(text)


def _nodes(node: Any) -> Iterator[Any]:
    """A node and all that it holds, as often as it stands there."""
    yield node
    for child in node.value if isinstance(node.value, list) else ():
        for part in child if isinstance(child, tuple) else (child,):
            yield from _nodes(part)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, int):
        return abs(value) < 2**64
    return value is None or isinstance(value, float | str)
