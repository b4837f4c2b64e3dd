"""The benchmarks run, and what they say of memory (never of time) holds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def figures_of(work: Path, script: str, *arguments: str, gigabytes: float) -> dict[str, Any]:
    """The last line of a benchmark that ran once in `work` and left nothing there."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments,
               "--gigabytes", str(gigabytes), "--runs", "1", "--dir", work]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(work.iterdir()) == []
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def test_expand_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "expand.py", gigabytes=0.15)
    assert figures["output_bytes"] > 2 * figures["source_bytes"] > 2 * 130e6
    assert set(figures["arms"]) == {"dd", "exact", "noise"}
    for arm in ("exact", "noise"):
        assert len(figures["arms"][arm]["ratio_to_dd"]) == 1
        # The bound that is promised for every model: anonymous memory above Python with torch, in MiB.
        assert figures["arms"][arm]["rss_anon_above_torch_mib"] < 300


def test_diff_weights_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "diff.py", "weights", "--growth=--uniform-x2", "--growth=--hidden-x3", gigabytes=0.1)
    assert set(figures["growths"]) == {"--uniform-x2", "--hidden-x3"}
    for found in figures["growths"].values():
        assert found["grown_bytes"] > 2 * figures["source_bytes"] > 2 * 70e6
        assert len(found["rate_over_cat"]) == 1
        assert found["rss_anon_above_torch_mib"] < 300


def test_diff_logits_benchmark(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "diff.py", "logits", "--dtype", "float32", gigabytes=0.01)
    (found,) = figures["growths"].values()
    assert found["whole_wall_seconds"][0] > found["whole_loading_seconds"][0] + found["whole_running_seconds"][0] > 0
    # The whole grown model in float32, and one layer at a time of it: anonymous memory above Python with torch.
    assert found["whole_rss_anon_above_torch_mib"] > 2 * found["grown_bytes"] / 2**20
    assert 0 < found["rss_anon_above_torch_mib"] < found["vm_hwm_mib"]
    assert len(found["wall_over_whole"]) == len(found["cpu_over_whole"]) == 1


def test_state_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "state.py", gigabytes=0.03)
    assert figures["output_bytes"]["state"] > 300e6
    assert len(figures["state_rate_over_weights_rate"]) == 1
    for found in figures["arms"].values():
        assert found["rss_anon_above_torch_mib"] < 300
