"""`gdagrow convert`: what it says when it is done."""

import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gdagrow.choices import Format
from gdagrow.dcp import CONFIG
from gdagrow.format_conversion import Conversion, Converted, convert_format, plan_conversion
from gdagrow.units import bytes_text
from gdagrow_cli.byte_progress import byte_progress
from gdagrow_cli.console import print_json, print_unbroken, printable, stdout_console
from gdagrow_cli.plan_view import print_section
from gdagrow_cli.stopping import Stopped


def run_convert(
    source: Path, target: Path, to: Format, config: Path | None, prefix: str | None, max_file_bytes: int, *,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a checkpoint's weights in another format and say what was written.

    Raises:
        GdagrowError: the source cannot be read or has the format already, or the output cannot be written.
    """
    conversion = plan_conversion(source, to, config=config, prefix=prefix, max_file_bytes=max_file_bytes)
    start = time.monotonic()
    with byte_progress("converting", conversion.num_bytes, shown=not as_json and not quiet) as advance:
        try:
            converted = convert_format(conversion, target, progress=advance)
        except Stopped as stopped:
            if (target / CONFIG).exists():  # the output is put into place whole, so it came before the signal
                raise Stopped(stopped.signum, f"{target} is there, whole") from None
            raise
    seconds = time.monotonic() - start
    if as_json:
        print_json({
            "output": str(target), "format": to.value, "seconds": seconds, "bytes": conversion.num_bytes,
            "files": {layout.file: layout.file_bytes for layout in conversion.layouts},
            "copied": converted.copied, "left_behind": [asdict(skip) for skip in converted.left_behind],
        })  # fmt: skip
    elif not quiet:
        _print(stdout_console(), to, conversion, converted, seconds)


def _print(console: Console, to: Format, conversion: Conversion, converted: Converted, seconds: float) -> None:
    count = len(conversion.layouts)
    print_unbroken(console, f"wrote {converted.target}")
    rate = bytes_text(conversion.num_bytes / max(seconds, 1e-9))
    amount = bytes_text(conversion.num_bytes)
    console.print(f"  {amount} of weights as {to} in {count} file{'s' * (count != 1)}, {seconds:.1f} s, {rate}/s")
    if not converted.copied and not converted.left_behind:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for path in converted.copied:
        table.add_row(printable(path), "copied")
    for skip in converted.left_behind:
        table.add_row(printable(skip.path), Text.assemble(("left behind: ", "yellow"), skip.reason))
    print_section(console, "Beside the weights", table)
