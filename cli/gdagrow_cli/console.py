"""Where output goes: results to stdout, all else to stderr, and no text of a user's is ever taken for markup."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text


def stdout_console() -> Console:
    """Results; colours and control characters only on a terminal."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr_console() -> Console:
    """Progress."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def printable(text: object) -> str:
    """A path or name as it is, but for what a terminal would act on or could not show, which is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=2, default=str))


def print_error(sentence: str) -> None:
    """One line on stderr."""
    print(f"error: {printable(sentence)}", file=sys.stderr)


def print_unbroken(console: Console, *parts: str | Text) -> None:
    """One line that is not wrapped, so that a path or command in it can be copied."""
    console.print(Text.assemble(*(Text(printable(p)) if isinstance(p, str) else p for p in parts)), soft_wrap=True)
