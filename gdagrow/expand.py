"""Carry out a plan: read, grow and write a checkpoint as a stream, then publish it whole."""

import hashlib
import json
import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Final

import torch
from torch import Tensor

from gdagrow.engine import grow_rows
from gdagrow.errors import OutputError
from gdagrow.formats.file_layout import FileLayout
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.publish import Companions, check_free_space, copy_companions, list_companions, staged
from gdagrow.formats.safetensors_header import INDEX_FILE
from gdagrow.formats.safetensors_layout import index_json
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.growth import block_rows
from gdagrow.header import ITEM_BYTES
from gdagrow.layout import CHUNK_BYTES, KEPT_CHUNKS, LOOKAHEAD, layout_of, num_workers
from gdagrow.plan import GrowthPlan, TensorPlan
from gdagrow.reading import open_reader
from gdagrow.record import RECORD_FILE, FileDigest, growth_record, read_record, record_text
from gdagrow.split import Noise

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
    place = Path(os.path.abspath(target))
    _require_apart(source, place)
    layouts = layout_of(plan, max_shard_bytes)
    history = read_record(source)
    with staged(place) as partial, ThreadPoolExecutor(1, "gdagrow-hash-source") as hasher:
        beside = sum((source / name).stat().st_size for name in list_companions(source).copied)
        check_free_space(place.parent, sum(layout.file_bytes for layout in layouts) + beside + _SPARE_BYTES)
        stop = Event()
        read = hasher.submit(_digests, source, plan.header.shards, stop)
        try:
            companions = copy_companions(source, partial)
            written = _write_weights(plan, layouts, partial, progress)
            record = growth_record(plan, read=read.result(), written=written, history=history)
            _write(partial / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
            _write(partial / RECORD_FILE, record_text(record))
            if len(layouts) > 1:
                _write(partial / INDEX_FILE, index_json(layouts).decode())
        finally:
            stop.set()
    return Expansion(target, written, companions)


def _require_apart(source: Path, target: Path) -> None:
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if real_target.is_relative_to(real_source):
        raise OutputError(f"{target} lies in the source {source}, which is never changed; choose another output")


def _write_weights(
    plan: GrowthPlan, layouts: tuple[FileLayout, ...], directory: Path, progress: Progress | None
) -> dict[str, FileDigest]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    recipe = plan.recipe
    noise = None if recipe.exact_copies else Noise(recipe.snr_db, recipe.seed)
    written = {}
    with open_reader(plan.header) as reader, _Grower(reader, noise) as grower:
        for layout in layouts:
            path = directory / layout.file
            with FileWriter(path, layout) as writer:
                for chunk in grower.chunks(tensors[tensor.name] for tensor in layout.tensors):
                    writer.write(chunk)
                    if progress:
                        progress(len(chunk))
                written[layout.file] = FileDigest(layout.file_bytes, writer.close())
    return written


@dataclass(frozen=True)
class _Job:
    """Grow source rows `[start, stop)` of a tensor seen as `[rows, columns]`; they are the next rows of the output.

    `again`: whether the same rows, and so the same bytes, come once more further down.
    """

    tensor: TensorPlan
    start: int
    stop: int
    again: bool


_Grown = tuple[memoryview, Tensor]  # a chunk, and the buffer that holds it


class _Grower:
    """Grows tensors chunk by chunk, in order, on worker threads and in a few buffers that go round."""

    def __init__(self, reader: TensorReader, noise: Noise | None) -> None:
        self._reader = reader
        self._noise = noise
        # Each worker is one thread; torch's own threads would only get in its way.
        self._workers = ThreadPoolExecutor(num_workers(), "gdagrow-grow", torch.set_num_threads, (1,))
        # The buffer used last is used next: those that are never needed are never touched, and take no memory.
        self._free: queue.LifoQueue[Tensor] = queue.LifoQueue()
        for _ in range(LOOKAHEAD + 1 + KEPT_CHUNKS):
            self._free.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8))

    def __enter__(self) -> "_Grower":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)

    def chunks(self, tensors: Iterable[TensorPlan]) -> Iterator[memoryview]:
        """Yield the grown bytes of tensors in order; a chunk may be overwritten once the next is asked for."""
        jobs = (job for tensor in tensors for job in _jobs(tensor))
        ahead: deque[tuple[_Job, Future[_Grown]]] = deque()
        kept: dict[tuple[str, int], Future[_Grown]] = {}  # by tensor and first row
        while True:
            for job in islice(jobs, LOOKAHEAD - len(ahead)):
                key = job.tensor.name, job.start
                grown = kept.get(key) or self._workers.submit(self._grow, job)
                if job.again and len(kept) < KEPT_CHUNKS:
                    kept[key] = grown
                ahead.append((job, grown))
            if not ahead:
                break
            job, grown = ahead.popleft()
            chunk, buffer = grown.result()
            yield chunk
            if not job.again:
                kept.pop((job.tensor.name, job.start), None)
            if kept.get((job.tensor.name, job.start)) is not grown:
                self._free.put(buffer)

    def _grow(self, job: _Job) -> _Grown:
        tensor, growth = job.tensor, job.tensor.growth
        if len(growth.dims) == 1:
            source = self._reader.tensor(tensor.source.name).unsqueeze(0)
        else:
            source = self._reader.rows(tensor.source.name, job.start, job.stop)
        num_bytes = source.shape[0] * _row_bytes(tensor)
        buffer = self._free.get()
        if buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        grown = buffer[:num_bytes].view(source.dtype).view(source.shape[0], -1)
        noise = self._noise if tensor.noisy else None
        grow_rows(growth, source, grown, first_row=job.start, name=tensor.name, noise=noise)
        return tensor_bytes(buffer[:num_bytes]), buffer


def _row_bytes(tensor: TensorPlan) -> int:
    return tensor.growth.columns.size * ITEM_BYTES[tensor.source.dtype]


def _jobs(tensor: TensorPlan) -> Iterator[_Job]:
    """A tensor's rows in chunks, cut where blocks of source rows end so that no random word is drawn twice."""
    block = block_rows(tensor.growth)
    rows = max(1, CHUNK_BYTES // (_row_bytes(tensor) * block)) * block
    for segment in tensor.growth.rows.segments:
        start, stop = segment.old, segment.old + segment.length
        for cut in range(start - start % rows, stop, rows):
            yield _Job(tensor, max(cut, start), min(cut + rows, stop), again=segment.copy + 1 < segment.copies)


def _digests(directory: Path, names: Sequence[str], stop: Event) -> dict[str, FileDigest]:
    digests, block = {}, bytearray(2**20)
    for name in names:
        digest, num_bytes = hashlib.sha256(), 0
        with (directory / name).open("rb", buffering=0) as file:
            while (count := file.readinto(block)) and not stop.is_set():
                digest.update(memoryview(block)[:count])
                num_bytes += count
        digests[name] = FileDigest(num_bytes, digest.hexdigest())
    return digests


def _write(path: Path, text: str) -> None:
    # A name that is no UTF-8 has half surrogate pairs in it, whose escapes in Python and in JSON are the same.
    content = text.encode("utf-8", "backslashreplace")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free or choose another place") from None
