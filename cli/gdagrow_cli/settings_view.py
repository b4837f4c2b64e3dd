"""Settings of two configs that differ and that no weight shows."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gdagrow.verify.settings import Setting
from gdagrow_cli.console import printable
from gdagrow_cli.plan_view import print_section


def print_settings(console: Console, settings: Sequence[Setting]) -> None:
    """Print a section with the settings, if there are any."""
    if not settings:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("config.json", "source", "grown"):
        table.add_column(heading, overflow="fold")
    for setting in settings:
        table.add_row(printable(setting.key), _value(setting.source), _value(setting.grown))
    print_section(console, "Settings that change the function", table)


def _value(value: Any) -> str:
    return "absent" if value is None else printable(value)
