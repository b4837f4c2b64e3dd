"""The picture of the parts, `docs/parts.svg`: what stands on what. Run `python docs/parts.py` to draw it again.

tests/contract/test_parts_picture.py holds it against the import order, so that it cannot go stale.
"""

from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

# From the ground up: what a band is for, and its modules in the order in which they may import one another.
BANDS: Final[tuple[tuple[str, str], ...]] = (
    ("Ground: errors, and what a checkpoint says before it is read", "errors choices plain_yaml header"),
    ("One idea: index maps on named axes, and one engine", "axes coordinates heads depth growth split fresh engine"),
    ("What is asked for, and of which architecture", "recipe archs lambda_init views rows"),
    ("Formats: how checkpoints lie on the disk", "formats dcp dcp_tensors checkpoint reading row_files"),
    ("Plan: every decision and every refusal, before any work",
     "selection asked plan hints record units layout costs targets"),
    ("Growth carried out, as a stream", "output streaming states expand growing format_conversion"),
    ("Models in PyTorch and transformers", "models export"),
    ("Evidence, and pages to look at", "verify report"),
    ("Training, and experiments", "train experiment"),
    ("Commands, and all that is printed: cli/", "gdagrow_cli"),
)  # fmt: skip

_WIDTH, _BAND, _GAP, _LEFT = 820, 58, 8, 16
_BOX, _LETTER, _PAD, _SPACE = 22, 7.4, 16, 8
_STYLE = (
    ".h{font-size:13px;font-weight:600;fill:#0f172a}.m{font-size:12px;font-family:ui-monospace,monospace;fill:#0f172a}"
    ".s{font-size:12.5px;fill:#475569}"
)


def drawn() -> str:
    """The picture as SVG, the ground at the bottom."""
    height = 44 + len(BANDS) * (_BAND + _GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'role="img" aria-label="The parts of gdagrow, each standing on those below it"><style>{_STYLE}</style>',
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="#f8fafc"/>',
        f'<text x="{_LEFT}" y="28" class="s">A module imports only from what stands below it, or left of it in its own '
        "row.</text>",
    ]
    for row, (told, modules) in enumerate(reversed(BANDS)):
        y = 44 + row * (_BAND + _GAP)
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - 2 * _LEFT}" height="{_BAND}" rx="8" fill="#e2e8f0"/>'
            f'<text x="{_LEFT + 10}" y="{y + 19}" class="h">{escape(told)}</text>'
        )
        x = float(_LEFT + 10)
        for name in modules.split():
            width = _PAD + _LETTER * len(name)
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 28}" width="{width:.1f}" height="{_BOX}" rx="5" fill="#ffffff" '
                f'stroke="#94a3b8"/><text x="{x + _PAD / 2:.1f}" y="{y + 43}" class="m">{name}</text>'
            )
            x += width + _SPACE
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawn())
