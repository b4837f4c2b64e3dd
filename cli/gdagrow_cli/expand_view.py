"""`gdagrow expand`: its progress, and what it says when it is done."""

import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from rich.console import Console

from gdagrow.errors import GdagrowError, ResumeError
from gdagrow.expand import Expansion
from gdagrow.expand import expand as expand_checkpoint
from gdagrow.formats.journal import num_finished
from gdagrow.formats.publish import unfinished
from gdagrow.growing import Growing
from gdagrow.recipe import Recipe
from gdagrow.record import RECORD_FILE
from gdagrow.units import bytes_text, count_text
from gdagrow_cli.byte_progress import byte_progress
from gdagrow_cli.console import print_json, print_unbroken, printable, stdout_console
from gdagrow_cli.plan_view import (
    growth_as_dict,
    growth_text,
    learning_rate_multipliers,
    print_companions,
    print_hints,
    print_section,
    print_state,
)
from gdagrow_cli.stopping import Stopped

_NAMED: Final = 3  # tensors


def run_expand(growing: Growing, out: Path | None, *, resume: bool, as_json: bool, quiet: bool) -> None:
    """Carry out a growth and say what was written.

    Raises:
        GdagrowError: the checkpoint cannot be read, or the output cannot be written.
    """
    checkpoint = growing.plan.header.directory
    target = out or default_target(checkpoint, growing.plan.recipe)
    start = time.monotonic()
    with byte_progress("growing", growing.output.num_bytes, shown=not as_json and not quiet) as advance:
        expansion = _expand_or_stop(growing, target, resume, advance)
    seconds = time.monotonic() - start
    if as_json:
        files = {name: {"bytes": digest.num_bytes, "sha256": digest.sha256}
                 for name, digest in expansion.shards.items()}  # fmt: skip
        growth = growth_as_dict(growing, expansion.companions)
        print_json(
            {
                "output": str(expansion.target),
                "seconds": seconds,
                "files": files,
                "resumed": expansion.resumed,
                "not_finite": expansion.not_finite,
                **growth,
            }
        )
    elif not quiet:
        _print(stdout_console(), growing, expansion, seconds)


def default_target(checkpoint: Path, recipe: Recipe) -> Path:
    """`CKPT-<what was done>` beside the checkpoint, however its directory was written."""
    source = Path(os.path.abspath(checkpoint))
    return source.with_name(f"{source.name}-{recipe.label}")


def _expand_or_stop(growing: Growing, target: Path, resume: bool, advance: Callable[[int], None]) -> Expansion:
    try:
        return expand_checkpoint(growing.plan, target, growing.output, resume=resume, progress=advance)
    except Stopped as stopped:
        if (target / RECORD_FILE).exists():  # the output is put into place whole, so it came before the signal
            raise Stopped(stopped.signum, f"{target} is there, whole") from None
        raise Stopped(stopped.signum, _what_stays(growing, target) or stopped.told) from None
    except ResumeError:
        raise
    except GdagrowError as error:
        if stays := _what_stays(growing, target):
            raise type(error)(f"{error}; {stays}") from None
        raise


def _what_stays(growing: Growing, target: Path) -> str | None:
    """What a run that failed left for the next one, if anything."""
    place = unfinished(target)
    if place is None or not (finished := num_finished(place)):
        return None
    return f"{finished} of {len(growing.output.layouts)} files are finished and stay for expand --resume"


def _print(console: Console, growing: Growing, expansion: Expansion, seconds: float) -> None:
    plan, checkpoint = growing.plan, growing.plan.header.directory
    before = sum(info.num_elements for info in plan.header.stored.tensors.values())
    after = sum(tensor.num_elements for tensor in plan.tensors)
    files = f"{len(expansion.shards)} file{'s' * (len(expansion.shards) != 1)}"
    if expansion.resumed:
        files += f" ({len(expansion.resumed)} finished before)"
    print_unbroken(console, f"wrote {expansion.target}")
    console.print(f"  {growth_text(plan)}")
    ratios = dict.fromkeys((f"{plan.before.heads.ratio}:1", f"{plan.after.heads.ratio}:1"))
    console.print(f"  ratio {' to '.join(ratios)}, {count_text(before)} to {count_text(after)} parameters")
    rate = bytes_text(expansion.num_bytes / max(seconds, 1e-9))
    content = "weights and moments" if growing.output.record else "weights"
    console.print(f"  {bytes_text(expansion.num_bytes)} of {content} in {files}, {seconds:.1f} s, {rate}/s")
    if expansion.not_finite:
        print_unbroken(console, f"  {_not_finite_text(expansion.not_finite)}")
    print_state(console, growing)
    print_companions(console, growing, expansion.companions)
    print_hints(console, growing)
    print_section(console, "Next")
    if (checkpoint / "config.json").exists():  # a distributed checkpoint without one cannot be compared where it is
        print_unbroken(console, f"  gdagrow diff {_quoted(checkpoint)} {_quoted(expansion.target)}")
        print_unbroken(console, f"  gdagrow diff {_quoted(checkpoint)} {_quoted(expansion.target)} --weights")
    if learning_rate_multipliers(plan):
        record = printable(expansion.target / RECORD_FILE)
        print_unbroken(console, f"  then train it, with the learning-rate multipliers in {record}")
    else:
        console.print("  then train it")


def _not_finite_text(not_finite: Mapping[str, int]) -> str:
    """What of the source is NaN or infinite: how much, and where most of it is."""
    most = sorted(not_finite, key=lambda name: (-not_finite[name], name))
    named = ", ".join(f"{not_finite[name]:,} for {name}" for name in most[:_NAMED])
    more = f" and {len(most) - _NAMED} more, all in {RECORD_FILE}" if len(most) > _NAMED else ""
    return f"{sum(not_finite.values()):,} values of the source are NaN or infinite and stay so: {named}{more}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
