"""Carry out a plan: read, grow and write a checkpoint as a stream, then publish it whole."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from gdagrow.errors import OutputError
from gdagrow.formats.companions import Companions, copy_companions, list_companions
from gdagrow.formats.digests import FileDigest, SourceFiles, digest_file
from gdagrow.formats.file_layout import FileLayout
from gdagrow.formats.file_writer import FileWriter
from gdagrow.formats.journal import Journal
from gdagrow.formats.publish import check_free_space, make_directory, require_all, require_apart, staged, write_file
from gdagrow.fresh import Fresh
from gdagrow.output import Output
from gdagrow.plan import GrowthPlan
from gdagrow.reading import open_reader
from gdagrow.record import RECORD_FILE, growth_record, read_record, record_text
from gdagrow.split import Noise
from gdagrow.streaming import Grower

_SPARE_BYTES: Final = 2**20  # for config, index and record

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Expansion:
    """What was written: the directory, its weight files, and which companion files came along.

    resumed: Which of the weight files an earlier run had finished.
    not_finite: How many values of the source, which are passed on as they are, are NaN or infinite, by grown tensor.
    """

    target: Path
    shards: dict[str, FileDigest]
    companions: Companions
    resumed: tuple[str, ...]
    not_finite: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards.values())


def expand(
    plan: GrowthPlan, target: Path, output: Output, *, resume: bool = False, progress: Progress | None = None
) -> Expansion:
    """Grow a checkpoint into `target`, which appears whole or not at all.

    Args:
        plan: What to do.
        target: The directory to make; it may exist if it is empty.
        output: The files to write, such as `weights_output(plan, 5 * 10**9)`.
        resume: Go on with what an earlier run of this growth left when it was stopped or killed: the files that it
            finished are checked and kept. After a failure, leave what is finished for the next one.
        progress: Called with the number of bytes written, or found finished, since its last call.

    Raises:
        OutputError: the target exists, there is no room, or the disk refuses.
        ResumeError: what an earlier run left is of another growth.
        CheckpointError: the source cannot be read or changes meanwhile.
    """
    source = plan.header.directory
    place = Path(os.path.abspath(target))
    require_apart(source, place)
    history = read_record(source)
    advance = progress or (lambda _: None)
    names = dict.fromkeys(shard for header in output.sources.values() for shard in header.shards)
    with SourceFiles(source, names) as files:
        without_digests = growth_record(plan, read={}, written={}, history=history, state=output.record)
        journal = Journal(_identity(output, files, without_digests))
        with staged(place, goes_on=journal.continues if resume else None) as partial:
            told = journal.open(partial.parent)
            finished = dict(_still_finished(partial, output.layouts, told, advance))
            _remove_all_but(partial, finished)
            missing = sum(layout.file_bytes for layout in output.layouts if layout.file not in finished)
            beside = sum((source / name).stat().st_size for name in list_companions(source, output.carried).copied)
            check_free_space(place.parent, missing + beside + _SPARE_BYTES)
            companions = copy_companions(source, partial, output.carried)
            written, not_finite = _write_tensors(plan, output, partial, files, finished, journal, advance)
            told_of_state = {**output.record, **({"not_finite": not_finite} if not_finite else {})}
            record = growth_record(plan, read=files.digests(), written=written, history=history, state=told_of_state)
            write_file(partial / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
            write_file(partial / RECORD_FILE, record_text(record))
            for name, content in output.files.items():
                write_file(partial / name, content)
            require_all(partial, [*written, *companions.copied, "config.json", RECORD_FILE, *output.files])
    return Expansion(target, written, companions, tuple(finished), not_finite)


def _identity(output: Output, files: SourceFiles, record: Mapping[str, Any]) -> dict[str, str]:
    """What decides the bytes of an output, by what a person calls it."""
    layouts = [(file.file, file.tensors, file.literals) for file in output.layouts]
    return {
        "the versions in use": _digest_of(record["versions"]),
        # Not by the times of its inodes: it may have been copied to another disk since.
        "the source": _digest_of([(name, stat.num_bytes, stat.modified) for name, stat in files.stats.items()]),
        "the recipe": _digest_of(record["recipe"]),
        "the files to write": _digest_of([record, layouts]),
    }


def _digest_of(value: object) -> str:
    return sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()


def _still_finished(
    directory: Path, layouts: tuple[FileLayout, ...], told: Mapping[str, FileDigest], advance: Progress
) -> Iterator[tuple[str, FileDigest]]:
    """The files that are as the journal tells; one that is damaged is made again."""
    for layout in layouts:
        path = directory / layout.file
        if layout.file not in told or not path.is_file() or path.stat().st_size != layout.file_bytes:
            continue
        try:
            found = digest_file(path, lambda _: None)
        except OSError:  # damaged as well
            continue
        if found == told[layout.file]:
            advance(layout.data_bytes)
            yield layout.file, found


def _remove_all_but(directory: Path, finished: Mapping[str, FileDigest]) -> None:
    for path in directory.rglob("*"):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in finished:
            try:
                path.unlink()
            except OSError as error:
                raise OutputError(f"{path} cannot be removed ({error.strerror}); check the disk") from None


def _write_tensors(
    plan: GrowthPlan, output: Output, directory: Path, files: SourceFiles, finished: Mapping[str, FileDigest],
    journal: Journal, advance: Progress,
) -> tuple[dict[str, FileDigest], dict[str, int]]:  # fmt: skip
    recipe, done, total = plan.recipe, 0, output.num_bytes
    written: dict[str, FileDigest] = {}
    noise = None if recipe.exact_copies else Noise(recipe.snr_db, recipe.seed)
    with ExitStack() as stack:
        readers = {name: stack.enter_context(open_reader(header)) for name, header in output.sources.items()}
        grower = stack.enter_context(Grower(readers, noise, Fresh(plan.deviation, recipe.seed)))
        for layout in output.layouts:
            if layout.file in finished:
                written[layout.file] = finished[layout.file]
                for tensor in layout.tensors:
                    grower.look_at(output.tensors[tensor.name])
                done += layout.data_bytes
                continue
            path = directory / layout.file
            make_directory(path.parent)
            with FileWriter(path, layout) as writer:
                for chunk in grower.chunks(output.tensors[tensor.name] for tensor in layout.tensors):
                    writer.write(chunk)
                    advance(len(chunk))
                    done += len(chunk)
                    files.used(done / total)
                written[layout.file] = FileDigest(layout.file_bytes, writer.close())
            journal.add(layout.file, written[layout.file])
        return written, grower.not_finite
