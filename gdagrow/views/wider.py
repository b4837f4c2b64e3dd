"""A checkpoint seen with the gains of a residual stream that gets features of zero beside copies of its own.

RMSNorm averages over all features: `m` copies of `h` features among `h'` in all have `m h / h'` times the mean square.
What the norm puts out is larger by the root of its inverse, which the gains take back, and eps counts for more, which
the config takes back (growth-math 3.3). Gains are float64 whatever the checkpoint's dtype is: a shorter one would
round them.
"""

from math import inf, sqrt
from typing import Final

from gdagrow.archs import Architecture, in_model_order
from gdagrow.errors import CheckpointError, PlanError
from gdagrow.header import Header
from gdagrow.views import Derived, Made, Seen, view

RESCALED: Final = "it makes up for the features that the norm averages over besides"


def with_gains(header: Header, architecture: Architecture, hidden: int, new_hidden: int) -> Header:
    """See a checkpoint whose `hidden` features become `new_hidden`; itself where that is a multiple.

    Args:
        header: A checkpoint that fits the architecture's table.
        architecture: Its own.
        hidden, new_hidden: The sizes of the residual stream, before and after.

    Raises:
        PlanError: the architecture has one eps for these norms and for others.
        CheckpointError: the config has no eps that could be rescaled.
    """
    if new_hidden % hidden == 0:
        return header
    if architecture.norm_eps is None:
        raise PlanError(
            f"hidden {hidden} to {new_hidden} is no multiple, so that the eps of the norms must change, which the "
            f"{architecture.name} layout shares with its sub-norm; convert the checkpoint as well with --to motif (to: "
            f"motif in a recipe), or choose a multiple of {hidden}"
        )
    eps = header.config.get(architecture.norm_eps)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < inf:
        raise CheckpointError(
            f"config.json: {architecture.norm_eps}: expected a positive number, which hidden {hidden} to {new_hidden} "
            f"rescales, got {eps!r}; correct the config"
        )
    share = new_hidden // hidden * hidden / new_hidden
    factor = sqrt(share)
    derived: dict[str, Derived] = {}
    num_layers = architecture.sizes(header.config).num_layers
    for row, layer in in_model_order(architecture.table(header.config), num_layers):
        name = row.name.format(layer=layer)
        if row.part == "norm":
            derived[name] = Made(
                hidden, (name,), lambda gains: [gain * factor for gain in gains], name, RESCALED, factor
            )
        elif name in header.tensors:
            derived[name] = Seen(name)
    return view(header, {**header.config, architecture.norm_eps: eps * share}, derived)
