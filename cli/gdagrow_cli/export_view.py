"""`gdagrow export`: its progress, and what it says when it is done."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gdagrow.checkpoint import read_checkpoint
from gdagrow.dcp import DcpHeader
from gdagrow.errors import CheckpointError
from gdagrow.export import Export, export
from gdagrow.header import Header
from gdagrow.units import bytes_text
from gdagrow_cli.console import print_json, print_unbroken, printable, stderr_console, stdout_console
from gdagrow_cli.stopping import Stopped


def run_export(checkpoint: Path, out: Path, *, with_code: bool, as_json: bool, quiet: bool) -> None:
    """Export a checkpoint and say what was written.

    Raises:
        GdagrowError: the checkpoint cannot be read or be exported so, or the output cannot be written.
    """
    header = read_checkpoint(checkpoint)
    if isinstance(header, DcpHeader):
        raise CheckpointError(
            f"{checkpoint} is a distributed checkpoint; gdagrow convert --to safetensors makes a model directory of it"
        )
    start = time.monotonic()
    with _progress(header.num_bytes, shown=not as_json and not quiet) as advance:
        exported = _export_or_stop(header, out, with_code, advance)
    seconds = time.monotonic() - start
    if as_json:
        print_json({
            "output": str(exported.target), "seconds": seconds, "code": exported.code, "copied": exported.others,
            "files": {name: {"bytes": num_bytes} for name, num_bytes in exported.weights.items()},
            "left_behind": exported.left_behind,
        })  # fmt: skip
    elif not quiet:
        _print(exported)


def _export_or_stop(header: Header, out: Path, with_code: bool, advance: Callable[[int], None]) -> Export:
    try:
        return export(header, out, with_code=with_code, progress=advance)
    except Stopped as stopped:
        if (out / "config.json").exists():  # the output is put into place whole, so it came before the signal
            raise Stopped(stopped.signum, f"{out} is there, whole") from None
        raise


@contextmanager
def _progress(num_bytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield what takes the number of bytes written since its last call, and shows them on a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("copying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda more: progress.advance(task, more)


def _print(exported: Export) -> None:
    console = stdout_console()
    files = f"{len(exported.weights)} file{'s' * (len(exported.weights) != 1)}"
    print_unbroken(console, f"wrote {exported.target}")
    console.print(f"  {bytes_text(exported.num_bytes)} of weights in {files}, config.json", highlight=False)
    if exported.others:
        print_unbroken(console, f"  copied: {', '.join(map(printable, exported.others))}")
    if exported.left_behind:
        print_unbroken(console, f"  left behind, as training state: {', '.join(map(printable, exported.left_behind))}")
    if exported.code:
        console.print(f"  code in {len(exported.code)} files, named in config.json; to load it without gdagrow:")
        print_unbroken(
            console, f"    AutoModelForCausalLM.from_pretrained({str(exported.target)!r}, trust_remote_code=True)"
        )
    else:
        print_unbroken(console, "  to load it: import gdagrow.models.hf, then")
        print_unbroken(console, f"    AutoModelForCausalLM.from_pretrained({str(exported.target)!r})")
