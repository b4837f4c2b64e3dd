"""Grow tensors as a stream of bytes: chunk by chunk, in order, on a thread and in a few buffers that go round."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gdagrow.engine import grow_moment_rows, grow_rows, part_rows
from gdagrow.formats.file_writer import tensor_bytes
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.fresh import Fresh, fill_rows
from gdagrow.growth import block_rows
from gdagrow.layout import CHUNK_BYTES, KEPT_CHUNKS, NUM_CHUNKS
from gdagrow.output import GrownTensor
from gdagrow.reading import RowReader
from gdagrow.split import Noise


@dataclass(frozen=True)
class _Job:
    """Grow source rows `[start, stop)` of a tensor seen as `[rows, columns]`; they are the next rows of the output.

    `copy` of `copies`: which of the times that those rows stand in the grown tensor this is; `again`: whether the same
    bytes come once more further down; `fresh`: whether they come from no row of the source.
    """

    tensor: GrownTensor
    start: int
    stop: int
    copy: int
    copies: int
    again: bool
    fresh: bool


_Grown = tuple[memoryview, Tensor]  # a chunk, and the buffer that holds it


class Grower:
    """Grows tensors in order. Use as a context manager."""

    def __init__(self, readers: Mapping[str, RowReader], noise: Noise | None, fresh: Fresh) -> None:
        """`readers`: see `GrownTensor.files`; `noise` is for those tensors that are `noisy`."""
        self._readers, self._noise, self._fresh = readers, noise, fresh
        # One thread: torch's own would only get in its way, and two would wait for Python's lock at each of the many
        # short steps of a split, which made them slower than one.
        self._worker = ThreadPoolExecutor(1, "gdagrow-grow", torch.set_num_threads, (1,))
        # The buffer used last is used next: those that are never needed are never touched, and take no memory.
        self._free = [torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(NUM_CHUNKS)]
        self._not_finite: Counter[str] = Counter()

    def __enter__(self) -> "Grower":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    @property
    def not_finite(self) -> dict[str, int]:
        """How many values of what was read so far are NaN or infinite, by the grown tensor that they were read for."""
        return dict(sorted(self._not_finite.items()))

    def look_at(self, tensor: GrownTensor) -> None:
        """Only count what is not finite of a tensor that an earlier run has grown."""
        for job in _jobs(tensor):
            if tensor.files is not None and not job.fresh and not job.copy:
                self._read(tensor.files, job)

    def chunks(self, tensors: Iterable[GrownTensor]) -> Iterator[memoryview]:
        """Yield the grown bytes of tensors in order; a chunk may be overwritten once the next is asked for."""
        jobs = (job for tensor in tensors for job in _jobs(tensor))
        ahead: deque[tuple[_Job, Future[_Grown]]] = deque()
        kept: dict[tuple[str, int], Future[_Grown]] = {}  # by tensor and first row
        while True:
            # While chunks are written that were kept, those behind them are grown.
            while self._free and (job := next(jobs, None)):
                key = job.tensor.name, job.start
                grown = kept.get(key) or self._worker.submit(self._grow, job, self._free.pop())
                if job.again and len(kept) < KEPT_CHUNKS:
                    kept[key] = grown
                ahead.append((job, grown))
            if not ahead:
                break
            job, grown = ahead.popleft()
            chunk, buffer = grown.result()
            yield chunk
            key = job.tensor.name, job.start
            if not job.again:
                kept.pop(key, None)
            if kept.get(key) is not grown:
                self._free.append(buffer)

    def _grow(self, job: _Job, buffer: Tensor) -> _Grown:
        tensor, num_rows = job.tensor, job.stop - job.start
        num_bytes = num_rows * tensor.row_bytes
        if buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        grown = buffer[:num_bytes].view(DTYPES[tensor.dtype]).view(num_rows, -1)
        if tensor.files is None or (job.fresh and tensor.power is not None):
            grown.zero_()
        elif job.fresh:
            fill_rows(tensor.growth, grown, first_row=job.start, name=tensor.name, fresh=self._fresh)
        elif tensor.power is None:
            source, noise = self._read(tensor.files, job), self._noise if tensor.noisy else None
            grow_rows(
                tensor.growth, source, grown, first_row=job.start, name=tensor.name, noise=noise, fresh=self._fresh
            )
            if tensor.parted and self._noise is not None and job.copy:
                part_rows(tensor.growth, grown, copy=job.copy, first_row=job.start, name=tensor.name, noise=self._noise)
        else:
            source = self._read(tensor.files, job)
            grow_moment_rows(tensor.growth, source, grown, row_copies=job.copies, power=tensor.power)
            if tensor.factor != 1:
                grown.mul_(tensor.factor)
        return tensor_bytes(buffer[:num_bytes]), buffer

    def _read(self, files: str, job: _Job) -> Tensor:
        reader = self._readers[files]
        if len(job.tensor.growth.dims) == 1:
            rows = reader.tensor(job.tensor.source).reshape(1, -1)
        else:
            rows = reader.rows(job.tensor.source, job.start, job.stop)
        # A sum takes a hundredth of what looking at each value does, and is not finite if any of them is not.
        if not job.copy and not rows.sum().isfinite():
            found = rows.numel() - int(rows.isfinite().sum())  # none where finite values add up to more than may be
            self._not_finite += Counter({job.tensor.name: found})
        return rows


def _jobs(tensor: GrownTensor) -> Iterator[_Job]:
    """A tensor's rows in chunks, cut where blocks of source rows end so that no random word is drawn twice."""
    if not tensor.target.num_bytes:
        return
    block = block_rows(tensor.growth)
    rows = max(1, CHUNK_BYTES // (tensor.row_bytes * block)) * block
    for segment in tensor.growth.rows.segments:
        start, stop = segment.old, segment.old + segment.length
        for cut in range(start - start % rows, stop, rows):
            again = segment.copy + 1 < segment.copies and not tensor.parted
            yield _Job(
                tensor, max(cut, start), min(cut + rows, stop), segment.copy, segment.copies, again, segment.fresh
            )
