"""The site: built from these pages by Sphinx, which `make docs` calls; nothing on it needs a network.

The pages are plain Markdown that reads as well in a repository's own view. Made here: the navigation, from the lists of
links on the start page; the headings in docstrings that are left out there; signatures of recipes without their checks.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cli")]

import gdagrow  # noqa: E402

project, author, version = "gdagrow", "the gdagrow authors", gdagrow.__version__
release = version
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
smartquotes = False  # options are typed with two hyphens

html_theme = "furo"
html_title = f"gdagrow {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # which is fetched, and browsers fetch nothing from files
pygments_style, pygments_dark_style = "friendly", "monokai"

default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Pages whose lists and tables of links are navigation: the first link of each item or row.
_PARENTS = ("index", "python-api", "results/README")
_LINK = re.compile(r"^(?:- |\|).*?\[([^\]]+)\]\(([^)#]+)\.md\)", re.MULTILINE)
_FIELD = re.compile(r"(\w+(?:, \w+)*): \S")


def files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give pages of Markdown that are no part of the site as files, as other files beside the site are given."""
    source[0] = re.sub(r"\]\((\.\./\w+/README\.md)\)", r"](path:\1)", source[0])


def navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make a part of the navigation of each section of a page that lists other pages."""
    if docname not in _PARENTS:
        return
    for section in re.split(r"^##? ", source[0], flags=re.MULTILINE)[1:]:
        if pages := [f"{text} <{page}>" for text, page in _LINK.findall(section)]:
            caption = [f":caption: {section.splitlines()[0]}"] if docname == "index" else []
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", *caption, "", *pages, "```", ""])


def fields(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give the lines `field: meaning` of a class their heading."""
    if what != "class":
        return
    known = {field for kind in obj.__mro__ for field in getattr(kind, "__annotations__", {})}
    for start, line in enumerate(lines):
        found = _FIELD.match(line)
        if found and known.issuperset(found[1].split(", ")):
            lines[start:] = ["Attributes:", *(f"    {line}" for line in lines[start:])]
            return


def signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str | None, returned: str | None
) -> tuple[str, str] | None:
    """Show the fields of a recipe by name and default; their types are how they are checked, in no one's words."""
    if what != "class" or not issubclass(obj, BaseModel):
        return None
    told = [
        field if info.is_required() else f"{field}={info.get_default(call_default_factory=True)!r}"
        for field, info in obj.model_fields.items()
    ]
    return f"(*, {', '.join(told)})", ""


def dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Set the dash between a parameter and its meaning, which is left to smart quotes otherwise."""
    for text in [text for text in doctree.findall(nodes.Text) if text == " -- "]:
        text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def setup(app: Sphinx) -> None:
    app.connect("source-read", files)
    app.connect("source-read", navigation)
    app.connect("doctree-read", dashes)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", fields, priority=100)  # before napoleon reads the headings
