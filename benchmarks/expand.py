"""`gdagrow expand` against writing as many bytes with `dd`, and against copying as many with `cp`.

Sources come from the page cache, as after a training run's save; everything written reaches the disk before the clock
stops (`dd conv=fsync`, `cp` and then `sync` of the copies, `expand` by itself). `direct` is dd past the page cache,
which says what the disk itself takes.
"""

import os
import shlex
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cases import Case, Settings, compare
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, PYTHON, cat, cp, dd, timed

_SHARD = 100_000_000
# Of a source of 4 GB, and a little more than the 2 GiB that it is hashed ahead of being grown.
_PAGE_CACHE = 2_500_000_000


class Growth(NamedTuple):
    """A source and what is made of it; `gigabytes` are chosen so that each comes to 1.5 to 4 GB."""

    name: str
    dtype: str
    flags: str
    gigabytes: float
    sharded: bool = False


_X2 = "--hidden-x2 --ffn-x2 --signal-x2"
_UNEVEN = "--ratio 4:1 --hidden-to 2560"
GROWTHS = (
    Growth("bf16, x2", "bf16", _X2, 0.5),
    Growth("bf16, x3", "bf16", "--uniform-x3", 0.4),
    Growth("bf16, uneven", "bf16", _UNEVEN, 1.2),
    Growth("fp32, x2", "fp32", _X2, 0.8),
    Growth("fp32, x3", "fp32", "--uniform-x3", 0.65),
    Growth("bf16, x2, shards", "bf16", _X2, 0.5, sharded=True),
)
# Of the source, in GB: outputs of 0.1 to 10 GB.
_SIZES = (0.04, 0.1, 0.33, 0.9, 2.75)
_ONCE = 0.5  # GB of source from which a size is measured once


def against_the_disk(settings: Settings) -> Iterator[Case]:
    """Each growth exactly and with noise, beside the baselines."""
    for growth in GROWTHS:
        if settings.only in growth.name:
            gigabytes = growth.gigabytes / (8 if settings.quick else 1)
            yield _case(settings, growth._replace(gigabytes=gigabytes), settings.num_rounds(3), ("dd", "direct", "cp"))


def by_size(settings: Settings) -> Iterator[Case]:
    """The same growth of ever larger models: seconds and memory by bytes written."""
    for gigabytes in _SIZES[: 2 if settings.quick else None]:
        growth = Growth(f"{gigabytes:g} GB", "bf16", _X2, gigabytes)
        yield _case(settings, growth, settings.num_rounds(1 if gigabytes > _ONCE else 3), ("dd",))


def passes(settings: Settings) -> Iterator[Case]:
    """What is read from the disk and written to it where the page cache holds but a part of the source."""
    source, out = settings.work / "source", settings.work / "out"
    gigabytes, kept = (0.05, 40_000_000) if settings.quick else (4.0, _PAGE_CACHE)
    source_bytes = write_source(source, gigabytes=gigabytes, dtype="bf16", max_shard_bytes=_SHARD // 5)
    files = _weights(source)
    expand = [*GDAGROW, "expand", str(source), str(out), "--quiet", "--signal-x2"]

    def grow() -> dict[str, float]:
        run = timed(expand, while_it_runs=_LittleMemory(files, kept))
        written = sum(file.stat().st_size for file in _weights(out))
        shutil.rmtree(out)
        return {**run.figures(), "output_bytes": written}

    arms = {
        "cat": lambda: cat(files, _LittleMemory(files, kept)).figures(),
        "cat twice": lambda: cat([*files, *files], _LittleMemory(files, kept)).figures(),
        "expand": grow,
    }
    facts = {"source_bytes": source_bytes, "page_cache_bytes": kept, "growth": "--signal-x2"}
    yield compare("bf16, signal x2", facts, arms, settings.num_rounds(1))
    shutil.rmtree(source)


def _case(settings: Settings, growth: Growth, rounds: int, baselines: Sequence[str]) -> Case:
    source, out, other = (settings.work / name for name in ("source", "out", "other"))
    shard = {"max_shard_bytes": _SHARD} if growth.sharded else {}
    source_bytes = write_source(source, gigabytes=growth.gigabytes, dtype=growth.dtype, **shard)
    # Small sources are of hidden size 512 and not 2048.
    flags = growth.flags if growth.gigabytes >= 0.3 else growth.flags.replace("2560", "640")
    command = [*GDAGROW, "expand", str(source), str(out), "--quiet", *shlex.split(flags)]
    command += ["--max-shard-size", f"{_SHARD // 10**6}MB"] if growth.sharded else []
    written: list[int] = []  # by the last expand

    def expand(*more: str) -> dict[str, float]:
        run = timed([*command, *more])
        written[:] = [file.stat().st_size for file in _weights(out)]
        shutil.rmtree(out)
        return run.figures()

    if "cp" in baselines:
        timed(command)
        out.rename(settings.work / "grown")
    files = _weights(settings.work / "grown")  # what `cp` copies
    arms = {
        "exact": lambda: expand("--exact-copies"),
        "noise": expand,
        "dd": lambda: dd(other, sum(written)).figures(),
        "direct": lambda: dd(other, sum(written), "oflag=direct").figures(),
        "cp": lambda: cp(files, other).figures(),
    }
    arms = {arm: run for arm, run in arms.items() if arm in ("exact", "noise", *baselines)}
    cat([*_weights(source), *files])  # into the page cache
    facts: dict[str, Any] = {"source_bytes": source_bytes, "dtype": growth.dtype, "growth": flags, **_interpreters()}
    found = compare(growth.name, facts, arms, rounds)
    for directory in (source, settings.work / "grown"):
        shutil.rmtree(directory, ignore_errors=True)
    return replace(found, facts={**facts, "output_bytes": sum(written), "files": len(written)})


@cache
def _interpreters() -> dict[str, float]:
    """What Python takes by itself, and with torch."""
    commands = {"python": PYTHON, "torch": IMPORT_TORCH}
    return {f"{name}_anonymous": round(timed(command).anonymous, 1) for name, command in commands.items()}


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


class _LittleMemory:
    """Keeps no more than so many bytes of some files in the page cache: those that were read last.

    A pass over them in order then costs the disk each byte once, and a second pass each byte once more. It is called
    with the bytes that were read from the disk so far, which in one pass say how far it has come.
    """

    def __init__(self, files: Sequence[Path], num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._files = deque((file, file.stat().st_size) for file in files)
        for file in files:
            _evict(file)
        self._read = 0  # of the files that stay

    def __call__(self, read_from_disk: int) -> None:
        while self._files and read_from_disk - self._read > self._num_bytes:
            file, size = self._files.popleft()
            _evict(file)
            self._read += size


def _evict(file: Path) -> None:
    """Let the page cache forget a file that the disk has."""
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
