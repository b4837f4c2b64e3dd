"""`growth.json`: what a grown checkpoint says of how it came about, complete enough to repeat and to undo it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gdagrow
from gdagrow.axes import IndexMap
from gdagrow.errors import CheckpointError
from gdagrow.formats.digests import FileDigest
from gdagrow.formats.links import require_inside
from gdagrow.formats.small_file import read_small_file
from gdagrow.formats.strict_json import parse_object
from gdagrow.plan import GrowthPlan
from gdagrow.rows import told_by_row

RECORD_FILE: Final = "growth.json"
FORMAT: Final = 1
FEATURES: Final = ("hidden", "ffn")
# Keys of the config that are no sizes and that a recipe may name.
_NAMED: Final = ("rope_theta", "max_position_embeddings")


def growth_record(
    plan: GrowthPlan,
    *,
    read: Mapping[str, FileDigest],
    written: Mapping[str, FileDigest],
    history: list[Any],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """What goes into `growth.json`; it holds nothing that differs between two runs of the same growth.

    Args:
        plan: The growth.
        read, written: Source and output weight files by name.
        history: The records of earlier growths of the source, oldest first.
        state: What is said of the training state.
    """
    recipe, lost = plan.recipe, told_by_row((t.parameter, t.moments_lost) for t in plan.tensors)
    return {
        "format": FORMAT,
        "versions": {"gdagrow": gdagrow.__version__, **_versions()},
        "architecture": plan.architecture.name,
        "converted_from": plan.converted_from,
        "recipe": recipe.as_dict(),
        "factors": plan.factors,
        "tied": {"source": plan.tied_before, "grown": plan.tied_after},
        "noise": {"snr_db": recipe.snr_db, "seed": recipe.seed}
        if any(t.noisy or t.parted for t in plan.tensors)
        else None,
        "lineage": lineage(plan),
        "notation": {t.parameter: t.notation for t in plan.tensors},
        "learning_rate_multipliers": {t.parameter: t.learning_rate_multiplier for t in plan.tensors},
        "moments_not_carried": lost,
        **state,
        "source": {"name": plan.header.directory.resolve().name, "files": _files(read)},
        "output": {"files": _files(written)},
        "history": history,
    }


def record_text(record: Mapping[str, Any]) -> str:
    """The record as JSON, with lists of numbers, and lists of such pairs, on one line each."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # A line break inside brackets is never inside a string.
    item = r"(?:-?\d+|\[[-\d, ]*\])"
    for _ in range(2):
        text = re.sub(rf"\[\n\s*({item}(?:,\n\s*{item})*)\n\s*\]", _on_one_line, text)
    return text + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    return "[" + re.sub(r",\n\s*", ", ", found.group(1)) + "]"


def read_record(directory: Path) -> list[Any]:
    """Read the history of a source: the record of its own growth, preceded by those before it; empty if it has none.

    Raises:
        CheckpointError: there is a `growth.json` that cannot be read.
    """
    path = directory / RECORD_FILE
    return read_record_file(require_inside(directory, path)) if os.path.lexists(path) else []


def read_record_file(path: Path) -> list[Any]:
    """Read the history in a `growth.json`, as `read_record` does; never empty.

    Raises:
        CheckpointError: it cannot be read.
    """
    record = parse_object(read_small_file(path), str(path))
    earlier = record.pop("history", None)
    if not isinstance(earlier, list) or not all(isinstance(growth, dict) for growth in earlier):
        raise CheckpointError(
            f"{path}: expected the record of an earlier growth, got something else; restore or remove the file"
        )
    return [*earlier, record]


def growths_of(checkpoint: Path) -> list[dict[str, Any]]:
    """What `growth.json` says of each growth that made a checkpoint, in short and oldest first.

    Raises:
        CheckpointError: it cannot be read, or is no such record.
    """
    return [_in_short(checkpoint, record) for record in read_record(checkpoint)]


def _in_short(checkpoint: Path, record: Any) -> dict[str, Any]:
    try:
        noise = record["noise"]
        return {
            "source": record["source"]["name"], "converted_from": record.get("converted_from"),
            "architecture": record["architecture"], "factors": dict(record["factors"]),
            "new_layers": [int(layer) for layer in record["lineage"].get("new_layers", [])],
            "recipe": dict(record["recipe"]), "untied": record["recipe"].get("embeddings") == "untie",
            "settings": {key: record["recipe"][key] for key in _NAMED if key in record["recipe"]},
            "noise": noise and {"snr_db": float(noise["snr_db"]), "seed": int(noise["seed"])},
            "gdagrow": record["versions"]["gdagrow"],
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise CheckpointError(
            f"{checkpoint / RECORD_FILE}: expected the record of a growth, got something else; restore or remove it"
        ) from None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "safetensors")}


def lineage(plan: GrowthPlan) -> dict[str, Any]:
    """Which old index each new one comes from, along every axis."""
    maps = plan.maps.common
    by_layer = [growth.lineage() for growth in plan.heads_of_layer]
    alike = all(heads == by_layer[0] for heads in by_layer)
    found: dict[str, Any] = {
        # For each new query group, the old [group, signal head] of its signal heads, in order: in all layers, or in
        # each new layer.
        **({"signal_heads": by_layer[0]} if alike else {"signal_heads_by_layer": by_layer}),
        # For each new query group, the old group whose noise head it holds; for each new KV group, the old one.
        "noise_heads": list(plan.heads.group),
        "kv_groups": list(plan.heads.kv),
        # New features in order, as runs [start, stop) of old ones.
        **{axis: _old_runs(maps.of(axis, None)) for axis in FEATURES},
    }
    if fresh := {axis: count for axis in FEATURES if (count := maps.of(axis, None).num_fresh)}:
        # How many features stand behind those, that come from none.
        found["fresh"] = fresh
    if plan.layers.new:
        # For each new layer the old one that it is, or is a copy of; and which of them are such new blocks.
        found |= {"layers": list(plan.layers.source), "new_layers": sorted(plan.layers.new)}
    return found


def _old_runs(index_map: IndexMap) -> list[list[int]]:
    return [list(run) for run in index_map.runs if run[0] < index_map.old_size]


def _files(digests: Mapping[str, FileDigest]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": digest.num_bytes, "sha256": digest.sha256} for name, digest in sorted(digests.items())}
