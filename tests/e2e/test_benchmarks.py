"""The benchmark runs, and what it says of memory (never of time) holds."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_expand_benchmark_and_the_bound_on_memory(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "expand.py", "--gigabytes", "0.15", "--runs", "1", "--dir", tmp_path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["output_bytes"] > 2 * figures["source_bytes"] > 2 * 130e6
    assert set(figures["arms"]) == {"dd", "exact", "noise"}
    for arm in ("exact", "noise"):
        assert len(figures["arms"][arm]["ratio_to_dd"]) == 1
        # The bound that is promised for every model: anonymous memory above Python with torch, in MiB.
        assert figures["arms"][arm]["rss_anon_above_torch_mib"] < 300
    assert list(tmp_path.iterdir()) == []
