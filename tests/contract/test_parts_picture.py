"""The maintainers' picture of the parts is the import order, and is drawn from what it says."""

import runpy
from pathlib import Path

from tests.contract.test_import_layers import ORDER

PARTS = Path(__file__).parents[2] / "docs" / "parts.py"


def test_the_picture_shows_the_import_order() -> None:
    bands = [modules.split() for _, modules in runpy.run_path(str(PARTS))["BANDS"]]
    assert tuple(name for band in bands[:-1] for name in band) == ORDER, "put the module into a band of docs/parts.py"
    assert bands[-1] == ["gdagrow_cli"]


def test_the_picture_is_drawn_from_the_bands() -> None:
    assert PARTS.with_suffix(".svg").read_text() == runpy.run_path(str(PARTS))["drawn"](), "run: python docs/parts.py"
