"""Compare checkpoints, against what comparing them could cost at least, in turn, in the same run.

    python benchmarks/diff.py weights [--growth=--uniform-x2 --growth=...] [--dtype bf16]
    python benchmarks/diff.py logits [--growth=--signal-x2] [--dtype float64]

`weights`: `gdagrow diff --weights` against `cat` of both checkpoints' weight files, from the page cache, so both must
fit into memory. `logits`: `gdagrow diff` against loading each model whole, one after the other, and running it once on
the same tokens, which needs the grown model's weights in memory in `--dtype`. Prints a line for each growth, and one
JSON object with every figure as the last line.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint import write_source
from processes import GDAGROW, IMPORT_TORCH, Run, cat, timed

_GROWTHS = {"weights": ["--signal-x2", "--uniform-x2", "--hidden-x3"], "logits": ["--signal-x2"]}
_SEQS, _LENGTH = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = parser.add_subparsers(dest="arm", required=True)
    for arm, dtypes in (("weights", ("bf16", "fp32")), ("logits", ("float64", "float32", "bfloat16"))):
        command = arms.add_parser(arm)
        command.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
        command.add_argument("--gigabytes", type=float, default=3.0, help="size of the source")
        command.add_argument("--runs", type=int, default=3)
        command.add_argument("--growth", action="append", help="may be given several times")
        command.add_argument(
            "--dtype", choices=dtypes, default=dtypes[0], help=f"of the {arm}; logits are of bf16 models"
        )
    forwards = arms.add_parser("forwards", help="what `logits` compares with; prints its seconds as JSON")
    forwards.add_argument("models", nargs="+", type=Path)
    forwards.add_argument("--dtype", required=True)
    options = parser.parse_args()
    if options.arm == "forwards":
        print(json.dumps(run_whole_models(options.models, options.dtype)))
        return
    work = Path(mkdtemp(prefix="gdagrow-bench-", dir=options.dir))
    try:
        report(work, options)
    finally:
        shutil.rmtree(work)


def report(work: Path, options: argparse.Namespace) -> None:
    stored = options.dtype if options.arm == "weights" else "bf16"
    source = work / "source"
    source_bytes = write_source(source, gigabytes=options.gigabytes, dtype=stored)
    base = timed(IMPORT_TORCH)
    figures: dict[str, Any] = {
        "source_bytes": source_bytes, "dtype": options.dtype, "import_torch_rss_anon_mib": round(base.anonymous),
        "import_torch_seconds": round(base.wall, 2), "growths": {},
    }  # fmt: skip
    print(f"source {source_bytes / 1e9:.2f} GB, {options.dtype}")
    for growth in options.growth or _GROWTHS[options.arm]:
        grown = work / "grown"
        timed([*GDAGROW, "expand", str(source), str(grown), "--quiet", *shlex.split(growth)])
        found = {"weights": against_cat, "logits": against_whole_models}[options.arm](source, grown, base, options)
        found["grown_bytes"] = sum(file.stat().st_size for file in grown.glob("*.safetensors"))
        figures["growths"][growth] = found
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        print(f"{growth}: {told}", flush=True)
        shutil.rmtree(grown)
    print(json.dumps(figures))


def against_cat(source: Path, grown: Path, base: Run, options: argparse.Namespace) -> dict[str, Any]:
    files = [file for directory in (source, grown) for file in sorted(directory.glob("*.safetensors"))]
    cat(files)  # into the page cache
    pairs = [(cat(files), timed([*GDAGROW, "diff", str(source), str(grown), "--weights"])) for _ in range(options.runs)]
    num_bytes = sum(file.stat().st_size for file in files)
    return _figures(base, [diff for _, diff in pairs]) | {
        "cat_gb_per_s": _rounded(num_bytes / read.wall / 1e9 for read, _ in pairs),
        "cat_cpu_seconds": _rounded(read.cpu for read, _ in pairs),
        **_ratio("rate_over_cat", [read.wall / diff.wall for read, diff in pairs]),
    }


def against_whole_models(source: Path, grown: Path, base: Run, options: argparse.Namespace) -> dict[str, Any]:
    models = [str(source), str(grown), "--dtype", options.dtype]
    tokens = ["--seqs", str(_SEQS), "--length", str(_LENGTH)]
    pairs = [(timed([sys.executable, __file__, "forwards", *models]), timed([*GDAGROW, "diff", *models, *tokens]))
             for _ in range(options.runs)]  # fmt: skip
    inside = [json.loads(whole.stdout) for whole, _ in pairs]
    return _figures(base, [diff for _, diff in pairs]) | {
        "whole_wall_seconds": _rounded(whole.wall for whole, _ in pairs),
        "whole_cpu_seconds": _rounded(whole.cpu for whole, _ in pairs),
        "whole_loading_seconds": _rounded(seconds["loading"] for seconds in inside),
        "whole_running_seconds": _rounded(seconds["running"] for seconds in inside),
        "whole_rss_anon_above_torch_mib": round(max(whole.anonymous for whole, _ in pairs) - base.anonymous),
        **_ratio("wall_over_whole", [diff.wall / whole.wall for whole, diff in pairs]),
        **_ratio("cpu_over_whole", [diff.cpu / whole.cpu for whole, diff in pairs]),
    }


def run_whole_models(models: list[Path], dtype: str) -> dict[str, float]:
    """Load each model whole and run it once; returns the seconds of both steps, over all models."""
    import torch

    from gdagrow.models.gda import load_model
    from gdagrow.verify.tokens import random_tokens

    seconds = {"loading": 0.0, "running": 0.0}
    for directory in models:
        start = time.perf_counter()
        model = load_model(directory, dtype=getattr(torch, dtype))
        loaded = time.perf_counter()
        vocab = model.model.embed_tokens.num_embeddings
        with torch.no_grad():
            model(random_tokens(vocab, seqs=_SEQS, length=_LENGTH, seed=0))
        seconds["loading"] += loaded - start
        seconds["running"] += time.perf_counter() - loaded
        del model  # before the next is loaded
    return seconds


def _figures(base: Run, diffs: list[Run]) -> dict[str, Any]:
    return {
        "wall_seconds": _rounded(diff.wall for diff in diffs),
        "cpu_seconds": _rounded(diff.cpu for diff in diffs),
        "rss_anon_above_torch_mib": round(max(diff.anonymous for diff in diffs) - base.anonymous),
        "vm_hwm_mib": round(max(diff.resident for diff in diffs)),
    }


def _ratio(name: str, ratios: list[float]) -> dict[str, Any]:
    return {name: _rounded(ratios), f"median_{name}": round(statistics.median(ratios), 2)}


def _rounded(values: Any) -> list[float]:
    return [round(value, 2) for value in values]


if __name__ == "__main__":
    main()
