"""Write a file of tensors front to back, hashing it and putting it on the disk meanwhile."""

import ctypes
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from mmap import MAP_PRIVATE, mmap
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from typing_extensions import Self

from gdagrow.errors import OutputError
from gdagrow.formats.direct_file import DirectFile
from gdagrow.formats.file_layout import FileLayout

if TYPE_CHECKING:
    import torch

# A file is hashed and written in blocks of this size, while the next ones are filled.
BLOCK_BYTES: Final = 8 * 2**20
NUM_BLOCKS: Final = 3


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without copying them; the tensor lives as long as they do."""
    assert tensor.is_contiguous(), f"{tensor.shape} with strides {tensor.stride()}"
    assert tensor.device.type == "cpu", tensor.device
    if not tensor.nbytes:
        return memoryview(b"")
    octets = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    octets._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(octets).cast("B")


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes; large ones so that other threads go on meanwhile, which they do not while Python itself copies."""
    if source.readonly:
        target[:] = source
    else:
        to, origin = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (target, source))
        ctypes.memmove(to, origin, len(source))


class FileWriter:
    """Write the tensors of one file front to back; the bytes of its format are put in where they belong.

    Use as a context manager: left without `close`, it closes the file as it is. It holds `NUM_BLOCKS` blocks of memory.
    """

    def __init__(self, path: Path, layout: FileLayout) -> None:
        """Create `path`, which may not exist.

        Raises:
            OutputError: the file cannot be created.
        """
        self._path = path
        self._literals = deque(layout.literals)
        self._data_bytes, self._given = layout.data_bytes, 0
        self._written = 0  # literals included
        self._digest = sha256()
        # Maps begin at a page, as direct writes demand.
        self._blocks = [memoryview(mmap(-1, BLOCK_BYTES, MAP_PRIVATE)) for _ in range(NUM_BLOCKS)]
        self._in_use: deque[tuple[Future[None], ...]] = deque()
        try:
            self._file = DirectFile(path)
        except OSError as error:
            raise self._failed(error) from None
        self._hasher = ThreadPoolExecutor(1, "gdagrow-hash")
        self._disk = ThreadPoolExecutor(1, "gdagrow-disk")
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, buffer: memoryview) -> None:
        """Append bytes of the tensors; they are copied, so the buffer is free for other use on return.

        Raises:
            OutputError: the disk refused bytes given before, or these are more than the layout's.
        """
        assert self._open, "write after close"
        rest = buffer.cast("B")
        if self._given + len(rest) > self._data_bytes:
            raise OutputError(f"{self._path}: expected {self._data_bytes} bytes, got more; report this as a bug")
        while rest:
            self._append_literals()
            count = min(len(rest), self._literals[0][0] - self._given) if self._literals else len(rest)
            self._append(rest[:count])
            self._given += count
            rest = rest[count:]

    def _append_literals(self) -> None:
        while self._literals and self._literals[0][0] == self._given:
            self._append(memoryview(self._literals.popleft()[1]))

    def _append(self, rest: memoryview) -> None:
        while rest:
            filled = self._written % BLOCK_BYTES
            count = min(len(rest), BLOCK_BYTES - filled)
            _copy(self._blocks[0][filled : filled + count], rest[:count])
            self._written += count
            rest = rest[count:]
            if self._written % BLOCK_BYTES == 0:
                self._send(BLOCK_BYTES)

    def _send(self, num_bytes: int) -> None:
        """Hand the first block to the hash and the disk, and bring a free one to the front."""
        block = self._blocks[0][:num_bytes]
        self._in_use.append(
            (self._hasher.submit(self._digest.update, block), self._disk.submit(self._file.write, block))
        )
        self._blocks.append(self._blocks.pop(0))
        while len(self._in_use) >= NUM_BLOCKS:
            self._await_oldest()

    def _await_oldest(self) -> None:
        try:
            for future in self._in_use.popleft():
                future.result()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> str:
        """Finish the file on the disk.

        Returns:
            The SHA-256 of the whole file, in hexadecimal.

        Raises:
            OutputError: the disk refuses, or bytes of the layout were never written.
        """
        assert self._open, "close after close"
        if self._given != self._data_bytes:
            raise OutputError(
                f"{self._path}: expected {self._data_bytes} bytes, got {self._given}; report this as a bug"
            )
        self._append_literals()
        self._send(self._written % BLOCK_BYTES)
        while self._in_use:
            self._await_oldest()
        try:
            self._file.sync()
            self._let_go()
        except OSError as error:
            raise self._failed(error) from None
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Close the file as it is, if it is open, and stop the threads; nobody wants it any more."""
        with suppress(OSError):
            self._let_go()

    def _let_go(self) -> None:
        if not self._open:
            return
        self._open = False
        self._hasher.shutdown(cancel_futures=True)
        self._disk.shutdown(cancel_futures=True)
        self._file.close()

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path} cannot be written ({error.strerror}); free or choose another place")
