"""Ports for processes that meet on this machine."""

import os
import socket
from itertools import count

# Below the range that the kernel gives away by itself, so that nothing takes a port before it is listened on: other
# tests run at the same time, and a launcher takes seconds to start.
_FIRST, _NUM_PORTS = 10_000, 20_000
_IN_A_PROCESS = 8
_asked = count()


def free_port() -> int:
    """A port that is free, and that no test in another process asks for meanwhile."""
    while True:
        port = _FIRST + (_IN_A_PROCESS * os.getpid() + next(_asked)) % _NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
