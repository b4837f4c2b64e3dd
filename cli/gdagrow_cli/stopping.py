"""Ctrl-C and a termination request end a command by an exception, so that it cleans up behind itself."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Stopped(BaseException):
    """The process was asked to stop; `told` says what became of the work."""

    def __init__(self, signum: int, told: str = "nothing was written") -> None:
        super().__init__(signum, told)
        self.signum = signum
        self.told = told

    @property
    def exit_code(self) -> int:
        return 128 + self.signum

    def __str__(self) -> str:
        return f"{'interrupted' if self.signum == signal.SIGINT else 'terminated'}; {self.told}"


@contextmanager
def stop_by_exception() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Stopped`; a second one ends the process at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(signum: int, _: FrameType | None) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise Stopped(signum)
