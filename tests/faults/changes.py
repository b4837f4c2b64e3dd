"""Ways in which a file of a source may change while it is read."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_into(path: Path) -> None:
    """Change bytes of weights, which lie towards the end."""
    with path.open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        octets = file.read(2)
        file.seek(-200, os.SEEK_END)
        file.write(bytes(octet ^ 1 for octet in octets))


def write_and_set_time(path: Path) -> None:
    stat = path.stat()
    write_into(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 200)


def replace(path: Path) -> None:
    stat, other = path.stat(), path.with_name("other")
    shutil.copy2(path, other)
    write_into(other)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


CHANGES: list[Callable[[Path], None]] = [write_into, write_and_set_time, cut, replace, Path.unlink]
