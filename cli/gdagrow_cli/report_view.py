"""`gdagrow report`: one page about a checkpoint and what it was grown into."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from gdagrow.errors import ReportError
from gdagrow.formats.atomic_file import require_writable, write_whole
from gdagrow.report.gather import gather
from gdagrow.report.training import read_run
from gdagrow.units import bytes_text
from gdagrow_cli.console import print_json, print_unbroken, stdout_console
from gdagrow_cli.running import require_device, status


def require_target(out: Path | None, *, force: bool, as_json: bool) -> None:
    """Refuse, before any work, what could not be written in the end.

    Raises:
        ReportError: there is nowhere to write to, or what draws the page is not installed.
        OutputError: the file is there, or cannot be.
    """
    if out is None:
        if not as_json:
            raise ReportError("report writes a page: say where with --out FILE.html, or ask for its data with --json")
        return
    require_writable(out, replace=force)
    if find_spec("matplotlib") is None:
        raise ReportError("a page needs the matplotlib package: pip install 'gdagrow[report]', or take --json alone")


def run_report(
    source: Path, grown: Sequence[Path], tokens: Tensor, out: Path | None, *, origin: str, runs: Sequence[Path],
    dtype: str, device: str, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure, and write the page to `out` or print its data, or both.

    Raises:
        GdagrowError: a checkpoint or a run cannot be read, or the page cannot be written.
    """
    require_device(device)
    curves = [read_run(run) for run in runs]
    with status("measuring", shown=not as_json) as tell:
        report = gather(
            source, grown, tokens, origin=origin, dtype=getattr(torch, dtype), device=device, runs=curves, progress=tell
        ).as_dict()
        if out is not None:
            from gdagrow.report.page import page_of

            tell("drawing")
            page = page_of(report).encode()
            write_whole(out, page, replace=force)
    if as_json:
        print_json(report)
    elif out is not None:
        console = stdout_console()
        print_unbroken(console, f"wrote {out}")
        models = f"{1 + len(grown)} model{'s' * bool(grown)}"
        told = f", {len(runs)} training run{'s' * (len(runs) > 1)}" if runs else ""
        console.print(f"  {models}{told}, {bytes_text(len(page))}")
