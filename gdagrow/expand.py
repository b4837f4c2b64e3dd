"""Carry out a plan: read, grow and write a checkpoint as a stream, then publish it whole."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final

from gdagrow.errors import CheckpointError
from gdagrow.formats.companions import Companions, copy_companions, list_companions
from gdagrow.formats.file_writer import FileWriter
from gdagrow.formats.publish import check_free_space, require_apart, staged, write_file
from gdagrow.formats.unchanged import unchanged
from gdagrow.fresh import Fresh
from gdagrow.output import Output
from gdagrow.plan import GrowthPlan
from gdagrow.reading import open_reader
from gdagrow.record import RECORD_FILE, FileDigest, growth_record, read_record, record_text
from gdagrow.split import Noise
from gdagrow.streaming import Grower

_SPARE_BYTES: Final = 2**20  # for config, index and record

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Expansion:
    """What was written: the directory, its weight files, and which companion files came along."""

    target: Path
    shards: dict[str, FileDigest]
    companions: Companions

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards.values())


def expand(plan: GrowthPlan, target: Path, output: Output, *, progress: Progress | None = None) -> Expansion:
    """Grow a checkpoint into `target`, which appears whole or not at all.

    Args:
        plan: What to do.
        target: The directory to make; it may exist if it is empty.
        output: The files to write, such as `weights_output(plan, 5 * 10**9)`.
        progress: Called with the number of bytes written since its last call.

    Raises:
        OutputError: the target exists, there is no room, or the disk refuses.
        CheckpointError: the source cannot be read or changes meanwhile.
    """
    source = plan.header.directory
    place = Path(os.path.abspath(target))
    require_apart(source, place)
    history = read_record(source)
    shards = dict.fromkeys(shard for header in output.sources.values() for shard in header.shards)
    with (
        staged(place) as partial,
        unchanged(source / shard for shard in shards),
        ThreadPoolExecutor(1, "gdagrow-hash-source") as hasher,
    ):
        beside = sum((source / name).stat().st_size for name in list_companions(source, output.carried).copied)
        check_free_space(place.parent, sum(layout.file_bytes for layout in output.layouts) + beside + _SPARE_BYTES)
        stop = Event()
        read = hasher.submit(_digests, source, list(shards), stop)
        try:
            companions = copy_companions(source, partial, output.carried)
            written = _write_tensors(plan, output, partial, progress)
            record = growth_record(plan, read=read.result(), written=written, history=history, state=output.record)
            write_file(partial / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
            write_file(partial / RECORD_FILE, record_text(record))
            for name, content in output.files.items():
                write_file(partial / name, content)
        finally:
            stop.set()
    return Expansion(target, written, companions)


def _write_tensors(
    plan: GrowthPlan, output: Output, directory: Path, progress: Progress | None
) -> dict[str, FileDigest]:
    recipe, written = plan.recipe, {}
    noise = None if recipe.exact_copies else Noise(recipe.snr_db, recipe.seed)
    with ExitStack() as stack:
        readers = {files: stack.enter_context(open_reader(header)) for files, header in output.sources.items()}
        grower = stack.enter_context(Grower(readers, noise, Fresh(plan.deviation, recipe.seed)))
        for layout in output.layouts:
            path = directory / layout.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileWriter(path, layout) as writer:
                for chunk in grower.chunks(output.tensors[tensor.name] for tensor in layout.tensors):
                    writer.write(chunk)
                    if progress:
                        progress(len(chunk))
                written[layout.file] = FileDigest(layout.file_bytes, writer.close())
    return written


def _digests(directory: Path, names: Sequence[str], stop: Event) -> dict[str, FileDigest]:
    digests, block = {}, bytearray(2**20)
    for name in names:
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with (directory / name).open("rb", buffering=0) as file:
                while (count := file.readinto(block)) and not stop.is_set():
                    digest.update(memoryview(block)[:count])
                    num_bytes += count
        except OSError as error:
            raise CheckpointError(f"{directory / name} cannot be read ({error.strerror}); check the file") from None
        digests[name] = FileDigest(num_bytes, digest.hexdigest())
    return digests
