"""The import order of the house: a module imports only from what stands above it in one list."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gdagrow"

# From the ground up. A package counts as one; its own modules may import one another.
ORDER = (
    "errors", "choices", "plain_yaml", "header", "axes", "coordinates", "heads", "depth", "growth", "split", "fresh",
    "engine", "recipe", "archs", "lambda_init", "views", "rows", "formats", "dcp", "dcp_tensors", "checkpoint",
    "reading", "row_files", "selection", "asked", "plan", "hints", "record", "units", "layout", "costs", "targets",
    "output", "streaming", "states", "expand", "growing", "format_conversion", "models", "export", "verify", "report",
    "train", "experiment",
)  # fmt: skip
# Stricter than the order: these stand beside the growth of tensors and know nothing of it.
ONLY = {"formats": {"errors", "choices", "header"}, "models": {"errors", "header", "formats", "lambda_init"},
        "choices": set(), "split": set(), "header": set(), "lambda_init": set()}  # fmt: skip
# The command line's own, which the library never needs; the demo draws its progress itself.
TERMINAL, MAY_DRAW = {"typer", "click", "rich", "gdagrow_cli"}, {"train/demo.py"}
# Slow to import or not installed everywhere: inside functions only.
INSIDE_FUNCTIONS = {"transformers", "accelerate", "datasets", "tokenizers", "ruamel", "matplotlib", "scipy"}
# The modules made for one of these, which nothing imports that does without it.
NAMED_FOR = {
    "matplotlib": {
        "report/panel.py",
        "report/charts.py",
        "report/head_maps.py",
        *(f"experiment/{name}.py" for name in ("plots", "difference_plot", "look")),
    },
    "transformers": {
        *(f"models/{name}.py" for name in ("hf", "hf_config", "hf_layers", "hf_model")),
        *(f"train/{name}.py" for name in ("building", "callbacks", "engine", "flow", "health_callback", "run")),
    },
}


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Every imported module by its dotted name, the line, and whether the import stands inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module == "gdagrow":
                yield from ((f"gdagrow.{alias.name}", node.lineno, id(node) in inside) for alias in node.names)
            else:
                yield "." * node.level + (node.module or ""), node.lineno, id(node) in inside


def violations(relative: str, source: str) -> list[str]:
    """What is wrong with the imports of the module at `relative` in the package, each with what to do."""
    own = relative.removesuffix(".py").split("/")[0]
    if own not in ORDER:
        return [f"gdagrow/{relative}: not in ORDER; add it to the list in {Path(__file__).name}, below all it imports"]
    found = []
    for name, line, inside in imports(ast.parse(source)):
        where, top, *rest = f"gdagrow/{relative}:{line}", *name.split(".")
        if name.startswith("."):
            found.append(f"{where}: relative import; write from gdagrow... import")
        elif top in TERMINAL and relative not in MAY_DRAW:
            found.append(f"{where}: imports {top}; printing belongs in cli/gdagrow_cli, return data to it")
        elif top in INSIDE_FUNCTIONS and relative not in NAMED_FOR.get(top, set()) and not inside:
            found.append(f"{where}: imports {top} at the top; import it in the function that needs it")
        elif top == "gdagrow" and rest and rest[0] != own:
            allowed = ONLY.get(own, set(ORDER[: ORDER.index(own)]))
            if rest[0] not in allowed:
                found.append(
                    f"{where}: {own} imports {rest[0]}, expected at most {', '.join(sorted(allowed)) or 'nothing'}; "
                    "move what is shared into a lower module"
                )
    return found


def modules() -> dict[str, str]:
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def test_imports_run_one_way() -> None:
    found = [problem for relative, source in modules().items() for problem in violations(relative, source)]
    assert found == [], "\n".join(["", *found])


def test_checking_weights_does_without_torch() -> None:
    """Its import would take longer than folding a checkpoint of some gigabytes."""
    loaded = "import sys, gdagrow.verify.weights, gdagrow_cli.certificate_view; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_the_order_names_what_exists() -> None:
    existing = {relative.removesuffix(".py").split("/")[0] for relative in modules()}
    assert set(ORDER) - existing == set(), "take modules that are gone out of ORDER"


@pytest.mark.parametrize(
    ("relative", "source", "complaint"),
    [
        (
            "axes.py",
            "from gdagrow.plan import x",
            "axes imports plan, expected at most choices, errors, header, plain_yaml; move what",
        ),
        ("axes.py", "import gdagrow.plan", "axes imports plan"),
        ("axes.py", "from gdagrow import plan", "axes imports plan"),
        ("axes.py", "def f():\n    from gdagrow.plan import x", "gdagrow/axes.py:2: axes imports plan"),
        (
            "formats/links.py",
            "from gdagrow.axes import x",
            "formats imports axes, expected at most choices, errors, header",
        ),
        ("models/gda.py", "from gdagrow.plan import x", "models imports plan"),
        ("plan.py", "import rich.progress", "imports rich; printing belongs in cli/gdagrow_cli"),
        ("plan.py", "from typer import Exit", "imports typer; printing"),
        ("verify/logits.py", "import transformers", "imports transformers at the top; import it in the function"),
        ("models/gda.py", "import transformers", "imports transformers at the top; import it in the function"),
        ("report/page.py", "import matplotlib", "imports matplotlib at the top; import it in the function"),
        ("plan.py", "from .axes import parse", "relative import"),
        ("plans.py", "", "gdagrow/plans.py: not in ORDER; add it"),
    ],
)
def test_violations_are_seen(relative: str, source: str, complaint: str) -> None:
    (found,) = violations(relative, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("plan.py", "from gdagrow.axes import parse\nimport torch, math"),
        ("archs/__init__.py", "def f():\n    from gdagrow.archs.motif import Motif"),
        ("verify/tokens.py", "def f():\n    from tokenizers import Tokenizer"),
        ("train/demo.py", "from rich.progress import Progress"),
        ("report/charts.py", "import matplotlib"),
        ("models/hf.py", "from transformers import PreTrainedModel"),
        ("record.py", "import gdagrow"),
    ],
)
def test_what_is_allowed(relative: str, source: str) -> None:
    assert violations(relative, source) == []
