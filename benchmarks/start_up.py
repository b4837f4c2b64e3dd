"""How long the command takes to start, against Python that does nothing, and against Python that imports torch."""

import shutil
from collections.abc import Iterator

from cases import Case, Settings, compare
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, PYTHON, timed

_ROUNDS = 15
_COMMANDS = {
    "--version": "--version",
    "--help": "--help",
    "expand --help": "expand --help",
    "inspect": "inspect {model}",
    "plan": "plan {model} --signal-x2",
    "diff --weights": "diff {model} {grown} --weights",
}


def benchmark(settings: Settings) -> Iterator[Case]:
    """Every command once in each round; the model is of some MB."""
    model, grown = settings.work / "model", settings.work / "grown"
    write_source(model, gigabytes=0.02, dtype="bf16")
    timed([*GDAGROW, "expand", str(model), str(grown), "--quiet", "--signal-x2"])
    commands = {"python": PYTHON, "import torch": IMPORT_TORCH} | {
        name: [*GDAGROW, *words.format(model=model, grown=grown).split()] for name, words in _COMMANDS.items()
    }
    arms = {name: lambda command=command: timed(command).figures() for name, command in commands.items()}
    for run in arms.values():
        run()  # compiles and reads what is imported
    yield compare("start", {}, arms, settings.num_rounds(_ROUNDS))
    for directory in (model, grown):
        shutil.rmtree(directory)
