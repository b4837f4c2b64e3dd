"""The `gdagrow` command: runs a command line, and turns whatever happens into an exit code and one sentence."""

import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper

import typer

from gdagrow.errors import GdagrowError
from gdagrow_cli import commands, evidence_commands  # noqa: F401  (their commands)
from gdagrow_cli.app import app
from gdagrow_cli.console import print_error
from gdagrow_cli.growth_flags import spread
from gdagrow_cli.stopping import Stopped, stop_by_exception

EXIT_ERROR, EXIT_BUG, EXIT_BROKEN_PIPE = 2, 70, 141

# Set by the scripts of --show-completion while a shell asks what may come next.
_COMPLETING = "_GDAGROW_COMPLETE"

# What a parser of options raises for a command line that it does not understand.
_UsageError = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: The words after `gdagrow`; those of this process if None.

    Returns:
        The exit code: 0, 1 if `diff` finds a difference, 2 for a user's mistake, 70 for a bug of ours, 130 and 143
        after SIGINT and SIGTERM.
    """
    words = spread(sys.argv[1:] if argv is None else argv)
    options_end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:options_end]
    words = [word for word in words[:options_end] if word != "--debug"] + words[options_end:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for is no error
    try:
        with stop_by_exception():
            code = app(words or ["--help"], prog_name="gdagrow", standalone_mode=False)
            sys.stdout.flush()
            return int(code or 0)
    except (BrokenPipeError, SystemExit) as ended:
        code = ended.code if isinstance(ended, SystemExit) else None
        if isinstance(code, int) and (code == 0 or _COMPLETING in os.environ):
            return code  # typer ends so after a completion, or what sets completion up
        # The reader has gone, which typer and rich turn into an exit; what Python still holds for it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _report(error)


def _report(error: BaseException) -> int:
    """Say in one sentence what went wrong; returns the exit code."""
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        return error.exit_code
    if isinstance(error, GdagrowError):
        print_error(str(error))
        return EXIT_ERROR
    if isinstance(error, _UsageError):
        print_error(_usage_sentence(error))
        return EXIT_ERROR
    print_error(f"a bug in gdagrow, {type(error).__name__}: {error}; run again with --debug and report what it prints")
    return EXIT_BUG


def _usage_sentence(error: BaseException) -> str:
    told: str = error.format_message()  # type: ignore[attr-defined]
    return f"{told[:1].lower()}{told[1:].rstrip('.')}; gdagrow --help and gdagrow COMMAND --help say what there is"


if __name__ == "__main__":
    sys.exit(main())
