"""Carry out a plan: read, grow and write a checkpoint as a stream, then publish it whole."""

import hashlib
import json
import os
import queue
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gdagrow.engine import block_rows, grow_rows
from gdagrow.errors import OutputError, RecipeError
from gdagrow.formats.publish import Companions, check_free_space, copy_companions, list_companions, staged
from gdagrow.formats.safetensors_header import INDEX_FILE
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.safetensors_writer import (
    BUFFERS_HELD, ShardLayout, ShardWriter, TargetTensor, index_json, plan_shards, tensor_bytes,
)  # fmt: skip
from gdagrow.growth import RowCopies, SourceRows, row_steps
from gdagrow.header import ITEM_BYTES
from gdagrow.plan import GrowthPlan, TensorPlan
from gdagrow.record import RECORD_FILE, FileDigest, growth_record, read_record
from gdagrow.split import Noise

CHUNK_BYTES: Final = 8 * 2**20  # of output; a few are in memory at a time, whatever the model
DEFAULT_MAX_SHARD_SIZE: Final = "5GB"

# Chunks being grown ahead of the one being written, and buffers for those, for that one, and for those being hashed.
_LOOKAHEAD: Final = 3
_NUM_BUFFERS: Final = _LOOKAHEAD + 1 + BUFFERS_HELD
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


def parse_size(text: str) -> int:
    """Read a size such as `5GB` (powers of ten), `512MiB` (powers of two) or a plain number of bytes.

    Raises:
        RecipeError: it is not one, or is less than a byte.
    """
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*(?:([KMGT])(i?)B?|B)?\s*", text, re.IGNORECASE)
    if found:
        number, prefix, binary = found.groups()
        power = " KMGT".index(prefix.upper()) if prefix else 0
        num_bytes = int(float(number) * (1024 if binary else 1000) ** power)
        if num_bytes >= 1:
            return num_bytes
    raise RecipeError(f"max-shard-size: expected a size such as 5GB, 500MB or 2GiB, got {text!r}")


def layout_of(plan: GrowthPlan, max_shard_bytes: int) -> tuple[ShardLayout, ...]:
    """The files that a plan will write, byte for byte but for the weights."""
    targets = [TargetTensor(tensor.name, tensor.source.dtype, tensor.shape) for tensor in plan.tensors]
    return plan_shards(targets, max_shard_bytes, plan.header.metadata)


def expand(plan: GrowthPlan, target: Path, *, max_shard_bytes: int, progress: Progress | None = None) -> Expansion:
    """Grow a checkpoint into `target`, which appears whole or not at all.

    Args:
        plan: What to do.
        target: The directory to make; it may exist if it is empty.
        max_shard_bytes: The largest weight file, unless a single tensor is larger.
        progress: Called with the number of bytes written since its last call.

    Raises:
        OutputError: the target exists, there is no room, or the disk refuses.
        CheckpointError: the source cannot be read or changes meanwhile.
    """
    source = plan.header.directory
    target = Path(os.path.abspath(target))
    _require_apart(source, target)
    layouts = layout_of(plan, max_shard_bytes)
    history = read_record(source)
    with staged(target) as partial, ThreadPoolExecutor(1, "gdagrow-hash-source") as hasher:
        beside = sum((source / name).stat().st_size for name in list_companions(source).copied)
        check_free_space(target.parent, sum(layout.file_bytes for layout in layouts) + beside + _SPARE_BYTES)
        read = hasher.submit(_digests, source, plan.header.shards)
        try:
            companions = copy_companions(source, partial)
            written = _write_weights(plan, layouts, partial, progress)
            record = growth_record(plan, read=read.result(), written=written, history=history)
            _write_json(partial / "config.json", plan.config)
            _write_json(partial / RECORD_FILE, record)
            if len(layouts) > 1:
                _write(partial / INDEX_FILE, index_json(layouts))
        except BaseException:
            read.cancel()
            raise
    return Expansion(target, written, companions)


def _require_apart(source: Path, target: Path) -> None:
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if real_target.is_relative_to(real_source):
        raise OutputError(f"{target} lies in the source {source}, which is never changed; choose another output")


def _write_weights(
    plan: GrowthPlan, layouts: tuple[ShardLayout, ...], directory: Path, progress: Progress | None
) -> dict[str, FileDigest]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    recipe = plan.recipe
    noise = None if recipe.exact_copies else Noise(recipe.snr_db, recipe.seed)
    written = {}
    with TensorReader(plan.header) as reader, _Grower(reader, noise) as grower:
        for layout in layouts:
            path = directory / layout.file
            with ShardWriter(path, layout) as writer:
                for chunk in grower.chunks(layout, tensors, path):
                    writer.write(chunk)
                    if progress:
                        progress(len(chunk))
                written[layout.file] = FileDigest(layout.file_bytes, writer.close())
    return written


@dataclass(frozen=True)
class _Job:
    """Some rows of a tensor of `[rows, columns]`, which begins at byte `start` of the shard being written."""

    tensor: TensorPlan
    step: SourceRows | RowCopies
    start: int

    @property
    def num_bytes(self) -> int:
        return (self.step.stop - self.step.start) * _row_bytes(self.tensor)


class _Grower:
    """Grows a shard's tensors chunk by chunk, in order, on worker threads and in a few buffers that go round."""

    def __init__(self, reader: TensorReader, noise: Noise | None) -> None:
        self._reader = reader
        self._noise = noise
        # Each worker is one thread; torch's own threads would only get in its way.
        workers = min(_LOOKAHEAD, len(os.sched_getaffinity(0)))
        self._workers = ThreadPoolExecutor(workers, "gdagrow-grow", torch.set_num_threads, (1,))
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            self._free.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8))

    def __enter__(self) -> "_Grower":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)

    def chunks(self, layout: ShardLayout, tensors: Mapping[str, TensorPlan], path: Path) -> Iterator[memoryview]:
        """Yield the bytes behind a shard's header, each chunk to be written to `path` before the next is asked for.

        A chunk stays as it is while `BUFFERS_HELD` more are yielded.
        """
        jobs = (job for entry in layout.entries
                for job in _jobs(tensors[entry.tensor.name], len(layout.header) + entry.start))  # fmt: skip
        ahead: deque[tuple[_Job, Future[tuple[memoryview, Tensor]] | None]] = deque()
        held: deque[Tensor] = deque()
        with path.open("rb") as file:
            while True:
                for job in islice(jobs, _LOOKAHEAD - len(ahead)):
                    # Rows that repeat earlier ones wait for those to be written.
                    fresh = isinstance(job.step, SourceRows)
                    ahead.append((job, self._workers.submit(self._grow, job) if fresh else None))
                if not ahead:
                    break
                job, future = ahead.popleft()
                chunk, buffer = future.result() if future else self._read_back(job, file.fileno())
                yield chunk
                held.append(buffer)
                if len(held) > BUFFERS_HELD:
                    self._free.put(held.popleft())
        for buffer in held:
            self._free.put(buffer)

    def _grow(self, job: _Job) -> tuple[memoryview, Tensor]:
        tensor, step, growth = job.tensor, job.step, job.tensor.growth
        if len(growth.dims) == 1:
            source = self._reader.tensor(tensor.source.name).unsqueeze(0)
        else:
            source = self._reader.rows(tensor.source.name, step.start, step.stop)
        buffer = self._buffer(job.num_bytes)
        grown = buffer[: job.num_bytes].view(source.dtype).view(source.shape[0], -1)
        noise = self._noise if tensor.noisy else None
        grow_rows(growth, source, grown, first_row=step.start, name=tensor.name, noise=noise)
        return tensor_bytes(buffer[: job.num_bytes]), buffer

    def _read_back(self, job: _Job, file: int) -> tuple[memoryview, Tensor]:
        buffer = self._buffer(job.num_bytes)
        chunk = tensor_bytes(buffer[: job.num_bytes])
        begin, done = job.start + job.step.start * _row_bytes(job.tensor), 0
        while done < len(chunk):
            count = os.preadv(file, [chunk[done:]], begin + done)
            if not count:
                raise OutputError("the output was truncated while it was written; let nothing else write there")
            done += count
        return chunk, buffer

    def _buffer(self, num_bytes: int) -> Tensor:
        buffer = self._free.get()
        return buffer if buffer.numel() >= num_bytes else torch.empty(num_bytes, dtype=torch.uint8)


def _row_bytes(tensor: TensorPlan) -> int:
    return tensor.growth.columns.size * ITEM_BYTES[tensor.source.dtype]


def _jobs(tensor: TensorPlan, start: int) -> Iterator[_Job]:
    """A tensor's rows in chunks, which end where blocks of source rows end so that no random word is drawn twice."""
    block = block_rows(tensor.growth)
    rows = max(1, CHUNK_BYTES // (_row_bytes(tensor) * block)) * block
    for step in row_steps(tensor.growth.rows):
        for cut in range(step.start - step.start % rows, step.stop, rows):
            yield _Job(tensor, type(step)(max(cut, step.start), min(cut + rows, step.stop)), start)


def _digests(directory: Path, names: Sequence[str]) -> dict[str, FileDigest]:
    digests = {}
    for name in names:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            digests[name] = FileDigest(file.tell(), digest.hexdigest())
    return digests


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free or choose another place") from None
