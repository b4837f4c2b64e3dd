"""`gdagrow plan --budget --compare`: uniform and group-differentiated growths that are each other's equals."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from gdagrow.checkpoint import read_checkpoint
from gdagrow.costs import CONTEXT_LENGTH, TRAINING_BYTES, ModelFigures
from gdagrow.errors import RecipeError
from gdagrow.targets.budget import NEAREST_TO_BUDGET, Arm, Comparison, compare_arms, parse_budget
from gdagrow.units import bytes_text, count_text
from gdagrow_cli.console import print_json, print_unbroken, stdout_console
from gdagrow_cli.figures_view import HEADING
from gdagrow_cli.growth_flags import flags_of

# A column: its heading, its key in JSON, the number, and how it is shown.
_COLUMNS: Final[tuple[tuple[str, str, Callable[[ModelFigures], int], Callable[[int], str]], ...]] = (
    ("params", "num_parameters", lambda m: m.num_parameters, count_text),
    ("FLOPs", "flops_per_token", lambda m: m.flops_per_token, count_text),
    ("KV\ncache", "kv_cache_bytes_per_token", lambda m: m.kv_cache_bytes_per_token, bytes_text),
    ("ratio", "ratio", lambda m: m.sizes.heads.ratio, "{}:1".format),
    ("query\nheads", "num_query_heads", lambda m: m.sizes.heads.num_query_heads, str),
    ("layers", "num_layers", lambda m: m.sizes.num_layers, str),
    ("training\nstate", "training_state_bytes", lambda m: m.training_state_bytes, bytes_text),
)
_CAPTION: Final = (
    f"FLOPs: forward, for a token that looks back on {CONTEXT_LENGTH}; KV cache: bytes a token",
    f"training state: float32 weights, gradients and two moments, {TRAINING_BYTES} bytes a parameter",
)


def require_alone(budget: str | None, compare: bool, others: Sequence[str]) -> None:
    """Raises RecipeError if one of `--budget` and `--compare` is missing, or something stands beside them."""
    if not compare:
        raise RecipeError(
            f"--budget {budget} is the size of growths to compare; add --compare, or ask for a growth without --budget"
        )
    if budget is None:
        raise RecipeError("--compare compares growths to a number of parameters; add it, such as --budget 7B")
    if others:
        raise RecipeError(f"--budget with --compare finds growths and plans none; leave {', '.join(others)} out")


def show_comparison(checkpoint: Path, budget: str, config: Path | None, *, as_json: bool) -> None:
    """Print the growths to compare at a budget.

    Raises:
        GdagrowError: the budget is none, or the checkpoint cannot be read or not grow to it.
    """
    size = parse_budget(budget)
    comparison = compare_arms(read_checkpoint(checkpoint, config), size)
    if as_json:
        print_json(_as_dict(checkpoint, comparison))
    else:
        _print(stdout_console(), checkpoint, comparison)


def _as_dict(checkpoint: Path, comparison: Comparison) -> dict[str, Any]:
    return {
        "directory": str(checkpoint),
        "budget": comparison.budget,
        "context_length": CONTEXT_LENGTH,
        "arms": {name: _arm_as_dict(arm) for name, arm in comparison.arms.items()},
        "missing": comparison.missing,
    }


def _arm_as_dict(arm: Arm) -> dict[str, Any]:
    recipe = {"recipe": arm.recipe.as_dict(), "flags": flags_of(arm.recipe)} if arm.recipe else {}
    return {**recipe, **{key: number(arm.model) for _, key, number, _ in _COLUMNS}}


def _print(console: Console, checkpoint: Path, comparison: Comparison) -> None:
    print_unbroken(console, str(checkpoint))
    console.print(f"growths to compare at {count_text(comparison.budget)} parameters")
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for heading, *_ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, arm in comparison.arms.items():
        table.add_row(name, *(text(number(arm.model)) for _, _, number, text in _COLUMNS))
    console.print(table)
    console.print()
    shares = [f"{name} {arm.model.num_parameters / comparison.budget:.2f} of it"
              for name, arm in comparison.arms.items() if name in NEAREST_TO_BUDGET]  # fmt: skip
    console.print(f"nearest to the budget: {', '.join(shares)}")
    for line in _CAPTION:
        console.print(line, style="dim")
    console.print()
    console.print("To make them", style=HEADING)
    for name, arm in comparison.arms.items():
        if arm.recipe:
            flags = " ".join(flags_of(arm.recipe))
            print_unbroken(console, f"  {name}: ", f"gdagrow expand {shlex.quote(str(checkpoint))} {flags}")
    for name, reason in comparison.missing.items():
        print_unbroken(console, f"  {name}: none, {reason}")
