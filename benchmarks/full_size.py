"""Grow a random model of Motif-2.6B's sizes to those of Motif-2-12.7B in one command, and prove that it is the same.

    python benchmarks/full_size.py [--dir DIR] [--scale 1.0] [--keep]

Writes the source (5.2 GB of bf16), grows it by recipes/motif-2.6b-to-12.7b.yaml (25.4 GB), holds every weight against
the source (`diff --weights`), and runs both models on 64 tokens, half a layer at a time (`diff --logits`). Baseline:
`dd conv=fsync` of as many bytes as are grown, in the same run. Needs about 31 GB of disk, and says so before it writes.
Prints each step, and one JSON object with every figure as the last line; fails if the grown model is not exactly what
it should be or a command takes more memory than is promised. `--scale 0.1` does the same with a tenth of the bytes:
head_dim, widths and vocabulary shrink alike, layers and heads stay, so that the recipe is the same.

The source differs from Motif-2.6B in one key: its RoPE base is the target's, 1,000,000, already. A change of it is not
a growth but another function, and would be all that the comparison sees.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from cases import Case, Settings
from checkpoint import shapes_of, write_checkpoint
from processes import GDAGROW, Run, timed

RECIPE = Path(__file__).parents[1] / "recipes" / "motif-2.6b-to-12.7b.yaml"

# The public config's keys; Motif-2.6B says neither num_noise_heads nor head_dim, and has a rope_theta of 500,000.
SOURCE: Mapping[str, Any] = {
    "model_type": "Motif", "hidden_size": 2048, "num_hidden_layers": 32, "intermediate_size": 8192,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 219520, "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "max_position_embeddings": 16384, "hidden_act": "poly_norm", "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}  # fmt: skip
TARGET: Mapping[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 40, "intermediate_size": 16384, "num_attention_heads": 40,
    "num_noise_heads": 8, "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 219520,
    "tie_word_embeddings": False, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
}  # fmt: skip
_HEAD_DIM = 128
_PROPORTIONAL = ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
_SHARDS = 3
_TOKENS = 64
# Of anonymous memory, in MiB: 1.5 and 4 GB.
PROMISED = {"expand": 1.5e9 / 2**20, "diff_logits": 4e9 / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the bytes")
    parser.add_argument("--keep", action="store_true", help="leave both models there")
    options = parser.parse_args()
    source, target = scaled(SOURCE, options.scale), scaled(TARGET, options.scale)
    work = Path(mkdtemp(prefix="gdagrow-bench-", dir=options.dir))
    try:
        require_room(work, source, {**source, **target})
        figures = report(work, source, target)
        missed = list(broken_promises(figures))
    finally:
        if not options.keep:
            shutil.rmtree(work)
    print(json.dumps({"scale": options.scale, **figures, "missed": missed}))
    if missed:
        raise SystemExit("; ".join(missed))


def benchmark(settings: Settings) -> Iterator[Case]:
    """The same as one case, at full size or a tenth."""
    source, target = (scaled(config, 0.1 if settings.quick else 1) for config in (SOURCE, TARGET))
    require_room(settings.work, source, {**source, **target})
    figures = report(settings.work, source, target)
    if missed := list(broken_promises(figures)):
        raise SystemExit("; ".join(missed))
    keys = {"wall": "wall_seconds", "cpu": "cpu_seconds", "anonymous": "rss_anon_mib"}
    steps = {step: {key: figures[found][step] for key, found in keys.items() if step in figures[found]}
             for step in figures["wall_seconds"]}  # fmt: skip
    facts = {key: value for key, value in figures.items() if key not in keys.values()}
    yield Case("Motif-2.6B to Motif-2-12.7B", facts, [steps], 0.0)
    for model in ("source", "grown"):
        shutil.rmtree(settings.work / model)


def scaled(config: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The config with about `scale` of the bytes: whole multiples of an even head_dim, which RoPE turns in halves."""
    head_dim = max(2, 2 * round(_HEAD_DIM / 2 * math.sqrt(scale)))
    return {key: value * head_dim // _HEAD_DIM if key in _PROPORTIONAL else value for key, value in config.items()}


def require_room(work: Path, *configs: Mapping[str, Any]) -> None:
    """Refuse a disk that cannot take both models; the file of `dd` has gone when the second is written."""
    # Two bytes a weight, and a hundredth for headers and the few vectors that are stored in more.
    needed = sum(2.02 * num_parameters(config) for config in configs)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise SystemExit(
            f"both models take {needed / 1e9:.1f} GB, and {work.parent} has {free / 1e9:.1f} GB free; give another "
            "place with --dir, or a smaller --scale"
        )


def num_parameters(config: Mapping[str, Any]) -> int:
    return sum(map(math.prod, shapes_of(config).values()))


def report(work: Path, source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Carry out every step; returns the figures."""
    models = [str(work / "source"), str(work / "grown")]
    shard_bytes, grown_bytes = 2 * num_parameters(source) // _SHARDS, 2 * num_parameters({**source, **target})
    start = time.perf_counter()
    write_checkpoint(work / "source", source, dtype="bf16", lambda_dtype="fp32", max_shard_bytes=shard_bytes)
    written = time.perf_counter() - start
    print(f"source: {num_parameters(source):,} parameters, {size_of(work / 'source') / 1e9:.2f} GB, "
          f"written in {written:.0f} s", flush=True)  # fmt: skip
    dd = ["dd", "if=/dev/zero", f"of={work / 'dd'}", "bs=1M", f"count={round(grown_bytes / 2**20)}", "conv=fsync"]
    runs = {"dd": told("dd", dd)}
    (work / "dd").unlink()
    expand = [*GDAGROW, "expand", *models, "--recipe", str(RECIPE), "--quiet"]
    runs["expand"] = told("expand", expand)
    print(f"grown: {size_of(work / 'grown') / 1e9:.2f} GB; ratio to dd "
          f"{runs['dd'].wall / runs['expand'].wall:.2f}", flush=True)  # fmt: skip
    runs["diff_weights"] = told("diff_weights", [*GDAGROW, "diff", *models, "--weights", "--json"])
    tokens = ["--seqs", "1", "--length", str(_TOKENS), "--json"]
    runs["diff_logits"] = told("diff_logits", [*GDAGROW, "diff", *models, "--logits", *tokens])
    config = json.loads((work / "grown" / "config.json").read_text())
    return {
        "source_bytes": size_of(work / "source"), "output_bytes": size_of(work / "grown"),
        "source_parameters": num_parameters(source), "grown_parameters": num_parameters(config),
        "sizes": {key: {"grown": config.get(key), "target": size} for key, size in target.items()},
        "wall_seconds": {step: round(run.wall, 1) for step, run in runs.items()},
        "cpu_seconds": {step: round(run.cpu, 1) for step, run in runs.items()},
        "rss_anon_mib": {step: round(run.anonymous) for step, run in runs.items() if step != "dd"},
        "ratio_to_dd": round(runs["dd"].wall / runs["expand"].wall, 2),
        "certificate": picked(runs["diff_weights"], "equivalent", "num_tensors", "num_elements"),
        "logits": picked(runs["diff_logits"], "equivalent", "max_abs", "max_rel", "tolerance", "length", "dtype"),
    }  # fmt: skip


def told(step: str, command: list[str]) -> Run:
    run = timed(command)
    print(f"{step}: {run.wall:.0f} s, {run.cpu:.0f} CPU s, at most {run.anonymous:.0f} MiB of RssAnon", flush=True)
    return run


def picked(run: Run, *keys: str) -> dict[str, Any]:
    found = json.loads(run.stdout)
    return {key: found[key] for key in keys}


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def broken_promises(figures: Mapping[str, Any]) -> Iterator[str]:
    for key, size in figures["sizes"].items():
        if size["grown"] != size["target"]:
            yield f"{key}: expected {size['target']}, got {size['grown']}"
    for step, limit in PROMISED.items():
        if figures["rss_anon_mib"][step] > limit:
            yield f"{step} took {figures['rss_anon_mib'][step]} MiB of RssAnon, expected at most {limit:.0f}"


if __name__ == "__main__":
    main()
