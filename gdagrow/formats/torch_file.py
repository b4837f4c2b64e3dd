"""Files of `torch.save`: read where their tensors lie without reading them, and laid out without having them.

The pickle inside is read by torch with `weights_only`, so code in it is refused and never run. Tensors stay where they
are: in the tree that is returned a `TensorInfo` stands for each. The same way back: torch itself writes the file around
holes, and what stands between the holes becomes the literals of a `FileLayout`, so that a file larger than memory can
be written as a stream. The checksums of its records stay zero, which torch does not look at.
"""

import io
import os
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from gdagrow.errors import CheckpointError
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.pickle_tree import PickleRefusedError, parse, refused
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.formats.weight_files import FLOATING
from gdagrow.header import Header, TensorInfo

_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
# A bool is an int; dicts, lists and tuples hold them.
_PLAIN: Final = (Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_MAX_PICKLE: Final = 100_000_000  # bytes; some hundred for each tensor
_MAX_VALUES: Final = 2_000_000
_MAX_DEPTH: Final = 100
_MAX_SMALL: Final = 2**16  # bytes of a tensor that is no moment: a step count, a learning rate
_LOCAL_HEADER: Final = struct.Struct("<26x2H")


def read_torch_file(path: Path) -> Any:
    """Read what `torch.save` wrote, with a `TensorInfo` in the place of each tensor: its name is its path in the tree.

    Raises:
        CheckpointError: the file cannot be read, is not of torch's zip format, or asks for more than tensors and plain
            values; nothing in it is run.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a regular file; restore it")
    try:
        with path.open("rb") as file, FakeTensorMode():
            tree = _load(file, str(path))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
    return map_leaves(tree, lambda name, leaf: _located(path, name, leaf, size) if isinstance(leaf, Tensor) else leaf)


def load_plain(octets: bytes, where: str) -> Any:
    """Load what `torch.save` wrote of tensors and plain values, whole; `where` names it in errors.

    Raises:
        CheckpointError: as for `read_torch_file`.
    """
    return _load(io.BytesIO(octets), where)


def require_plain_pickle(file: BinaryIO, where: str) -> None:
    """Refuse what torch itself should not be shown, which `weights_only` is not enough for.

    Tuples nested deep enough end the process when torch hashes them as a key, without an exception.

    Raises:
        CheckpointError: it is no file in torch's zip format, or its pickle holds more than plain data.
    """
    try:
        parse(_pickle_of_plain_zip(file, where), _Anything())
    except PickleRefusedError as error:
        raise refused(where, error) from None
    file.seek(0)


def _load(file: BinaryIO, where: str) -> Any:
    """Load a file, or refuse it before or after torch sees it; nothing in it is run."""
    require_plain_pickle(file, where)
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{where} asks for more than tensors and plain values ({_first_reason(error)}); it was not run: save the "
            "state as torch's own optimizers do"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{where} is damaged ({_first_line(error)}); restore the file") from None
    _require_plain_tree(tree, where)
    return tree


class _Anything(frozenset[tuple[str, str]]):
    """Admits every name: torch itself says which are too much, in words that its users know."""

    def __contains__(self, name: object) -> bool:
        return True


def _require_plain_tree(tree: Any, where: str) -> None:
    """Refuse what cannot be walked: a tree in itself, too deep, or of a few nodes that stand in billions of places."""
    level, count = [tree], 0
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict | list | tuple):
                below += node.values() if isinstance(node, dict) else node
            elif not isinstance(node, _PLAIN):
                raise CheckpointError(
                    f"{where} holds a {type(node).__name__}, expected tensors and plain values; save the state as "
                    "torch's own optimizers do"
                )
            if count + len(below) > _MAX_VALUES:
                raise CheckpointError(f"{where} holds more than {_MAX_VALUES:,} values; restore the file")
        count, level = count + len(below), below
        if not level:
            return
    raise CheckpointError(f"{where} is nested too deeply, or in itself; restore the file")


class TorchFileHeader(Header):
    """A file of `torch.save` as a header: its floating-point tensors by their paths in the tree."""

    @staticmethod
    def of(path: Path, tree: Any) -> "TorchFileHeader":
        """The header of a tree that `read_torch_file` read."""
        found = (leaf for leaf in _leaves(tree) if isinstance(leaf, TensorInfo) and leaf.dtype in FLOATING)
        return TorchFileHeader(path.parent, {}, {info.name: info for info in found}, {})


class TorchFileReader(TensorReader):
    """Rows of the tensors in a file of `torch.save`, mapped as a `TensorReader` maps them."""

    def _stored(self, path: Path) -> Mapping[str, TensorInfo]:
        return TorchFileHeader.of(path, read_torch_file(path)).tensors


def lay_out_torch_file(file: str, tree: Any) -> FileLayout:
    """Lay out the file that `torch.save` would write of `tree`.

    Args:
        file: Its name.
        tree: Nested dicts, lists and tuples of plain values, small tensors, which are written as they are, and
            `TargetTensor`s, whose bytes are written later in the order of the layout.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with tempfile.TemporaryDirectory(prefix="gdagrow-") as scratch:
        path = Path(scratch, file)
        with FakeTensorMode():
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(map_leaves(tree, lambda _, leaf: _hollow(leaf)), path)
            written = torch.load(path, weights_only=True)
        holes = [
            (_offset(hole), wanted)
            for wanted, hole in zip(_leaves(tree), _leaves(written), strict=True)
            if isinstance(wanted, TargetTensor | Tensor)
        ]
        return _around(path, sorted(holes, key=lambda hole: hole[0]))


def _around(path: Path, holes: list[tuple[int, TargetTensor | Tensor]]) -> FileLayout:
    """The layout of a file with holes, in order, for these tensors; those that are at hand are put in."""
    tensors: list[TargetTensor] = []
    literals: list[tuple[int, bytes]] = []
    num_bytes = at = 0
    pending = b""
    with path.open("rb") as hollow:
        for start, tensor in holes:
            pending += hollow.read(start - at)
            if isinstance(tensor, Tensor):
                pending += _octets(tensor)
                at = start + tensor.nbytes
            else:
                literals.append((num_bytes, pending))
                pending = b""
                tensors.append(tensor)
                num_bytes += tensor.num_bytes
                at = start + tensor.num_bytes
            hollow.seek(at)
        literals.append((num_bytes, pending + hollow.read()))
    return FileLayout(path.name, tuple(tensors), tuple(literals))


def _octets(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def read_small(path: Path, info: TensorInfo) -> Tensor:
    """Read a whole tensor that `read_torch_file` found, such as a step count.

    Raises:
        CheckpointError: it is no small one.
    """
    if info.stop - info.start > _MAX_SMALL:
        raise CheckpointError(
            f"{path}: tensor {info.name} has {info.num_elements:,} elements, where a number or a few are expected; "
            "restore the file"
        )
    with path.open("rb") as file:
        file.seek(info.start)
        octets = bytearray(file.read(info.stop - info.start))
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    tensor.reshape(-1).view(torch.uint8)[:] = torch.tensor(octets, dtype=torch.uint8)
    return tensor


def map_leaves(tree: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """A tree of dicts, lists and tuples with each leaf changed; `change` gets its path, keys joined by slashes."""
    if isinstance(tree, dict):
        kind = OrderedDict if isinstance(tree, OrderedDict) else dict
        return kind((key, map_leaves(value, change, _join(path, key))) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(value, change, _join(path, index)) for index, value in enumerate(tree))
    return change(path, tree)


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif type(tree) in (list, tuple):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def _hollow(leaf: Any) -> Any:
    if isinstance(leaf, TargetTensor):
        return torch.empty(leaf.shape, dtype=DTYPES[leaf.dtype])
    return torch.empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _offset(tensor: Tensor) -> int:
    """Where a tensor that was loaded in fake mode begins in its file."""
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None, "loaded in fake mode"
    return start + int(tensor.storage_offset()) * tensor.itemsize


def _located(path: Path, name: str, tensor: Tensor, file_bytes: int) -> TensorInfo:
    code = _CODES.get(tensor.dtype)
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: tensor {name}: expected one that is strided and stored, got {tensor.layout} on "
            f"{tensor.device}; save a plain copy"
        )
    if code is None or not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: tensor {name}: expected a dtype of {', '.join(DTYPES)} and elements in order, got {tensor.dtype} "
            f"with strides {list(tensor.stride())}; save a contiguous copy"
        )
    start = _offset(tensor)
    # Not by `nbytes`, whose 64 bits a shape may overflow.
    stop = start + prod(tensor.shape) * tensor.itemsize
    if stop > file_bytes:
        raise CheckpointError(f"{path}: tensor {name} ends beyond the file; restore the file")
    return TensorInfo(name, code, tuple(tensor.shape), path.name, start, stop)


def _pickle_of_plain_zip(file: BinaryIO, where: str) -> bytes:
    """The pickle in a zip whose records are stored as they are, read without allocating what a header claims."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise CheckpointError(
                    f"{where} is compressed, which torch never does; load and save it once with torch"
                )
            order = [_record(file, record) for record in records if record.filename.endswith("/byteorder")]
            pickles = [record for record in records if record.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
                raise ValueError(f"expected one pickle of at most {_MAX_PICKLE:,} bytes")
            pickled = _record(file, pickles[0])
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{where} is not a file in torch's zip format ({_first_line(error)}); restore it, or load and save it once "
            "with a current torch"
        ) from None
    if any(octets != b"little" for octets in order):
        raise CheckpointError(
            f"{where} was written on a big-endian machine; load and save it once on a little-endian one"
        )
    return pickled


def _record(file: BinaryIO, record: zipfile.ZipInfo) -> bytes:
    """A small record's bytes, whose checksum torch does not look at either."""
    file.seek(record.header_offset)
    name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    file.seek(name + extra, os.SEEK_CUR)
    return file.read(min(record.file_size, _MAX_PICKLE))


def _first_reason(error: Exception) -> str:
    """What the unpickler refused, without torch's advice on how to run it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if "GLOBAL" in line or line.startswith("Unsupported")]
    line = (refused or lines or ["no reason given"])[0]
    return line.partition(" was not an allowed global")[0].removeprefix("WeightsUnpickler error: ").rstrip(".")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
