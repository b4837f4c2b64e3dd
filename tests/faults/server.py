"""A process that forks one command line after the other, each with its fault, and imports what they imported.

Run by `tests.faults.injector.Forker`, with the fault library preloaded. It starts no thread, which a fork would not
survive. A line of JSON comes in for each command; its process number and then its exit code go out.
"""

import ctypes
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from typing import Any

import typer
from gdagrow_cli import commands
from gdagrow_cli.main import main

import gdagrow.expand  # noqa: F401  (imports torch)
from gdagrow.growing import prepare_growth

INJECTOR = ctypes.CDLL(None)
PLANNED: list[list[str]] = []
planned = cache(prepare_growth)
NO_CODE = 99
PIPE_BYTES = 2**16  # that a pipe holds


def arm(fault: dict[str, Any]) -> None:
    """Inject a fault into this process from here on."""
    INJECTOR.faults_arm(
        os.fsencode(fault["under"]), ctypes.c_long(fault["at"]), fault["kind"], fault["value"], _log(fault["log"])
    )


def _log(path: str | None) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600) if path else -1


def plan_once(asked: dict[str, Any]) -> None:
    """Plan an expand here, before the fork: where the source stays the same, all forks carry out the same plan."""
    commands.prepare_growth = planned if asked["planned"] else prepare_growth
    if asked["planned"] and asked["words"] not in PLANNED:
        PLANNED.append(asked["words"])
        with redirect_stdout(io.StringIO()):
            main([*asked["words"], "--dry-run"])


def carry_out(asked: dict[str, Any]) -> int:
    """Run a command line in this process; its exit code."""
    for file, path in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), file)
    # A shell starts background jobs with Ctrl-C ignored, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"],) * 2)
    if asked["fault"]:
        arm(asked["fault"])
    code = main(asked["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Answer until the input ends."""
    typer.main.get_command = cache(typer.main.get_command)  # a third of what a fork takes is to make it
    with redirect_stdout(io.StringIO()):
        main(["--version"])
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        plan_once(asked)
        imported, told = os.pipe()
        known = set(sys.modules)
        child = os.fork()
        if not child:
            code = NO_CODE
            try:
                os.chdir(asked["directory"])
                code = carry_out(asked)
                os.write(told, "\n".join(module for module in sys.modules if module not in known).encode()[:PIPE_BYTES])
            finally:
                os._exit(code)
        os.close(told)
        print(child, flush=True)
        sys.stdin.readline()  # until then the child keeps its number, even if it has ended
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        with open(imported) as modules:
            for module in modules.read().splitlines():
                with suppress(Exception):  # later forks have it then, or import it themselves too
                    importlib.import_module(module)
        gc.freeze()


if __name__ == "__main__":
    serve()
