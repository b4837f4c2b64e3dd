"""`gdagrow diff` against what comparing checkpoints could cost at least.

`weights`: against `cat` of both checkpoints' weight files, all from the page cache. `logits`: against loading each
model whole, one after the other, and running it once on the same tokens, which needs the grown model in memory.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cases import Case, Figures, Settings, compare
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, cat, timed

_WEIGHTS = (("bf16", "--signal-x2"), ("bf16", "--uniform-x2"), ("bf16", "--hidden-x3"), ("fp32", "--uniform-x2"))
_SEQS, _LENGTH = 4, 128


def weights(settings: Settings) -> Iterator[Case]:
    """`diff --weights` beside `cat`."""
    for dtype, growth in _WEIGHTS:
        if settings.only in f"{dtype}, {growth}":
            gigabytes = 0.1 if settings.quick else 1.5
            yield _grown(settings, dtype, growth, gigabytes, rounds=settings.num_rounds(5), arms=_against_cat)


def logits(settings: Settings) -> Iterator[Case]:
    """`diff --logits` beside two plain forwards."""
    gigabytes = 0.01 if settings.quick else 0.5
    yield _grown(settings, "bf16", "--signal-x2", gigabytes, rounds=settings.num_rounds(2), arms=_against_forwards)


Arms = dict[str, Callable[[], Figures]]


def _grown(
    settings: Settings, dtype: str, growth: str, gigabytes: float, *, rounds: int, arms: Callable[[Path, Path], Arms]
) -> Case:
    source, grown = settings.work / "source", settings.work / "grown"
    source_bytes = write_source(source, gigabytes=gigabytes, dtype=dtype)
    timed([*GDAGROW, "expand", str(source), str(grown), "--quiet", *shlex.split(growth)])
    files = [file for directory in (source, grown) for file in sorted(directory.glob("*.safetensors"))]
    cat(files)  # into the page cache
    facts = {
        "source_bytes": source_bytes, "bytes": sum(file.stat().st_size for file in files), "dtype": dtype,
        "growth": growth, "torch_anonymous": round(timed(IMPORT_TORCH).anonymous, 1),
    }  # fmt: skip
    found = compare(f"{dtype}, {growth}", facts, arms(source, grown), rounds)
    for directory in (source, grown):
        shutil.rmtree(directory)
    return found


def _against_cat(source: Path, grown: Path) -> Arms:
    files = [file for directory in (source, grown) for file in sorted(directory.glob("*.safetensors"))]
    diff = [*GDAGROW, "diff", str(source), str(grown), "--weights"]
    return {"cat": lambda: cat(files).figures(), "diff": lambda: timed(diff).figures()}


def _against_forwards(source: Path, grown: Path) -> Arms:
    models = [str(source), str(grown)]
    diff = [*GDAGROW, "diff", *models, "--dtype", "float64", "--seqs", str(_SEQS), "--length", str(_LENGTH)]

    def forwards() -> Figures:
        run = timed([sys.executable, __file__, *models])
        return {**run.figures(), **json.loads(run.stdout)}

    return {"forwards": forwards, "diff": lambda: timed(diff).figures()}


def run_whole_models(models: list[Path]) -> Figures:
    """Load each model whole in float64 and run it once; returns the seconds of both steps, over all models."""
    import torch

    from gdagrow.models.gda import load_model
    from gdagrow.verify.tokens import random_tokens

    seconds = {"loading": 0.0, "running": 0.0}
    for directory in models:
        start = time.perf_counter()
        model = load_model(directory, dtype=torch.float64)
        loaded = time.perf_counter()
        vocab = model.model.embed_tokens.num_embeddings
        with torch.no_grad():
            model(random_tokens(vocab, seqs=_SEQS, length=_LENGTH, seed=0))
        seconds["loading"] += loaded - start
        seconds["running"] += time.perf_counter() - loaded
        del model  # before the next is loaded
    return seconds


if __name__ == "__main__":
    print(json.dumps(run_whole_models([Path(model) for model in sys.argv[1:]])))
