"""What an experiment's directory holds for people: its tables in Markdown and its figures, beside `results.json`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gdagrow.errors import ReportError
from gdagrow.experiment.results import Results
from gdagrow.experiment.tables import tables
from gdagrow.formats.atomic_file import require_writable, write_whole

TABLES: Final = "tables.md"
_NEEDED: Final = ("matplotlib", "scipy")


def write_report(results: Results, directory: Path) -> tuple[Path, ...]:
    """Write `tables.md` and the figures of `plots`; each file of an earlier call is replaced when all of it is written.

    Everything is made before anything is written.

    Returns:
        The files, by name.

    Raises:
        ReportError: a package is missing.
        OutputError: a file cannot be written.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ReportError(
            f"tables and figures of an experiment need {' and '.join(missing)}: pip install 'gdagrow[experiment]'; "
            f"the runs in {directory} are kept"
        )
    from gdagrow.experiment.plots import plots

    files = {TABLES: tables(results).encode(), **plots(results)}
    paths = {directory / name: content for name, content in sorted(files.items())}
    for path in paths:
        require_writable(path, replace=True)
    for path, content in paths.items():
        write_whole(path, content, replace=True)
    return tuple(paths)
