"""Arguments and options that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A directory with config.json and safetensors weights.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of random tokens; 0 if left out.")
]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Take the tokens of this text instead of random ones.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where to compute, such as cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.", show_default=False)]


class Dtype(StrEnum):
    """Dtypes to compute logits in."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
