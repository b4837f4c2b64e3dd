"""Which evidence `gdagrow diff` is asked for, and which options go with it."""

from typing import Final

import typer

from gdagrow.errors import CompareError

_OF_A_RUN: Final = ("seqs", "length", "seed", "text", "dtype", "device")
# What would do nothing beside each kind of evidence, and why.
_IDLE: Final = {
    "logits": ("", ()),
    "weights": ("runs no model", (*_OF_A_RUN, "decode")),
    "gradients": ("decodes nothing", ("decode",)),
}


def require_one_evidence(context: typer.Context, *, logits: bool, weights: bool, gradients: bool) -> None:
    """Refuse more than one kind of evidence, and options that would do nothing beside it.

    Raises:
        CompareError: some were typed.
    """
    asked = [kind for kind, wanted in (("logits", logits), ("weights", weights), ("gradients", gradients)) if wanted]
    if len(asked) > 1:
        raise CompareError(f"--{' and --'.join(asked)}: one kind of evidence at a time; run the command once for each")
    for kind in asked:
        reason, idle = _IDLE[kind]
        if typed := [f"--{name}" for name in idle if _is_typed(context, name)]:
            raise CompareError(f"--{kind} {reason}, so {', '.join(typed)} would do nothing; leave it out or --{kind}")


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
