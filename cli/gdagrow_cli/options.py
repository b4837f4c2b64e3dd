"""Arguments and options that several commands take."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gdagrow.choices import Moments, Schedule

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A directory with config.json and safetensors weights.")
]
ModelConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        show_default=False,
        help="The config.json of a distributed checkpoint that has none, or a directory that has it.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of random tokens; 0 if left out.")
]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Take the tokens of this text instead of random ones.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where to compute, such as cpu or cuda.")]
_STATE = "Training state (of a checkpoint that has one)"
MomentsOption = Annotated[
    Moments | None,
    typer.Option(
        "--moments",
        rich_help_panel=_STATE,
        show_default=False,
        help="Optimizer moments: carry what grows exactly and reset the rest (auto, the default), carry or reset all.",
    ),
]
ScheduleOption = Annotated[
    Schedule | None,
    typer.Option(
        "--schedule",
        rich_help_panel=_STATE,
        show_default=False,
        help="Learning-rate schedule: go on where it was (keep, the default), or leave it to the next run at step 0.",
    ),
]
_COMPARING = "Growths to compare, instead of one"
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        rich_help_panel=_COMPARING,
        help="With --compare: the number of parameters to come near to, such as 7B or 700M.",
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        metavar="",
        rich_help_panel=_COMPARING,
        show_default=False,
        help="With --budget: show the uniform growth to it, and group-differentiated growths that are its equals.",
    ),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="The largest weight file, such as 5GB or 512MiB.")]
Quiet = Annotated[bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.", show_default=False)]


class Dtype(str, Enum):
    """Dtypes to compute logits in."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"

    __str__ = str.__str__  # as in StrEnum, which came with Python 3.11
