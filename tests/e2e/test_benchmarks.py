"""The benchmarks run, and what they say of memory (never of time) holds."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def start(work: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark in `work`, where it must leave nothing."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--dir", work]
    result = subprocess.run(command, capture_output=True, text=True)
    assert list(work.iterdir()) == []
    return result


def figures_of(work: Path, script: str, *arguments: str) -> dict[str, Any]:
    """The last line of a benchmark."""
    result = start(work, script, *arguments)
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def once(gigabytes: float) -> tuple[str, ...]:
    return "--gigabytes", str(gigabytes), "--runs", "1"


def test_expand_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "expand.py", *once(0.15))
    assert figures["output_bytes"] > 2 * figures["source_bytes"] > 2 * 130e6
    assert set(figures["arms"]) == {"dd", "exact", "noise"}
    for arm in ("exact", "noise"):
        assert len(figures["arms"][arm]["ratio_to_dd"]) == 1
        # The bound that is promised for every model: anonymous memory above Python with torch, in MiB.
        assert figures["arms"][arm]["rss_anon_above_torch_mib"] < 300


def test_diff_weights_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "diff.py", "weights", "--growth=--uniform-x2", "--growth=--hidden-x3", *once(0.1))
    assert set(figures["growths"]) == {"--uniform-x2", "--hidden-x3"}
    for found in figures["growths"].values():
        assert found["grown_bytes"] > 2 * figures["source_bytes"] > 2 * 70e6
        assert len(found["rate_over_cat"]) == 1
        assert found["rss_anon_above_torch_mib"] < 300


def test_diff_logits_benchmark(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "diff.py", "logits", "--dtype", "float32", *once(0.01))
    (found,) = figures["growths"].values()
    assert found["whole_wall_seconds"][0] > found["whole_loading_seconds"][0] + found["whole_running_seconds"][0] > 0
    # The whole grown model in float32, and one layer at a time of it: anonymous memory above Python with torch.
    assert found["whole_rss_anon_above_torch_mib"] > 2 * found["grown_bytes"] / 2**20
    assert 0 < found["rss_anon_above_torch_mib"] < found["vm_hwm_mib"]
    assert len(found["wall_over_whole"]) == len(found["cpu_over_whole"]) == 1


def test_state_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "state.py", *once(0.03))
    assert figures["output_bytes"]["state"] > 300e6
    assert len(figures["state_rate_over_weights_rate"]) == 1
    for found in figures["arms"].values():
        assert found["rss_anon_above_torch_mib"] < 300


def test_full_size_benchmark_at_a_tenth(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "full_size.py", "--scale", "0.1")
    assert figures["missed"] == []
    assert figures["source_bytes"] == pytest.approx(5.2e9 / 10, rel=0.05)
    assert figures["output_bytes"] == pytest.approx(25.4e9 / 10, rel=0.05)
    sizes = {key: size["grown"] for key, size in figures["sizes"].items()}
    assert (sizes["num_hidden_layers"], sizes["num_attention_heads"], sizes["num_noise_heads"]) == (40, 40, 8)
    assert (sizes["rope_theta"], sizes["max_position_embeddings"]) == (1e6, 32768)
    assert figures["certificate"]["num_elements"] == figures["grown_parameters"]
    assert figures["logits"]["max_rel"] < figures["logits"]["tolerance"] < 1e-11
    # What the full size may take; nearly all of it is torch here, as memory does not grow with the model.
    assert figures["rss_anon_mib"]["expand"] < 400


def test_full_size_needs_room(tmp_path: Path) -> None:
    result = start(tmp_path, "full_size.py", "--scale", "1e6")
    assert result.returncode == 1
    assert re.fullmatch(
        rf"both models take [\d.]+ GB, and {tmp_path} has [\d.]+ GB free; give another place with --dir, or a smaller "
        r"--scale\n",
        result.stderr,
    )
