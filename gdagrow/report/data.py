"""What a report says, as data: everything on the page is read from this, and `--json` prints it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gdagrow.costs import ModelFigures
from gdagrow.report.training import TrainingRun
from gdagrow.verify.attention import AttentionStats
from gdagrow.verify.clones import Clones
from gdagrow.verify.logits import Comparison
from gdagrow.verify.weights import Certificate


@dataclass(frozen=True)
class Tokens:
    """What the models were run on.

    origin: A text's path, or `random tokens, seed 0`.
    num_sequences, length: Sequences, and tokens in each.
    dtype: Of the arithmetic.
    """

    origin: str
    num_sequences: int
    length: int
    dtype: str


@dataclass(frozen=True)
class HeadLineage:
    """Where each grown head comes from, as `growth.json` writes it.

    signal_heads: For each new query group, the old `(group, signal head)` of its signal heads, in the first layer.
    noise_heads: For each new query group, the old group whose noise head it holds.
    kv_groups: For each new KV group, the old one.
    other_layers: The layers whose signal heads come of others than those of the first layer.
    """

    signal_heads: tuple[tuple[tuple[int, int], ...], ...]
    noise_heads: tuple[int, ...]
    kv_groups: tuple[int, ...]
    other_layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelReport:
    """One checkpoint.

    name, directory: Its directory's name, and its path as it was given.
    architecture: The table that covers it.
    figures: Its sizes and costs.
    growths: The growths that made it, oldest first, in short (see `growths_of`).
    attention: Statistics of its attention maps; None where `problems` says why.
    clones: How like its copies are; None where nothing says that it was grown, or `problems` says why.
    problems: Why something could not be measured, by its name here.
    """

    name: str
    directory: str
    architecture: str
    figures: ModelFigures
    growths: tuple[Mapping[str, Any], ...]
    attention: AttentionStats | None
    clones: Clones | None
    problems: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name, "directory": self.directory, "architecture": self.architecture,
            "figures": self.figures.as_dict(), "growths": list(self.growths),
            "attention": self.attention and self.attention.as_dict(), "clones": self.clones and self.clones.as_dict(),
            "problems": dict(self.problems),
        }  # fmt: skip


@dataclass(frozen=True)
class GrownReport:
    """A checkpoint beside the source that it was grown from; what is None could not be had, and `problems` says why."""

    model: ModelReport
    lineage: HeadLineage | None
    certificate: Certificate | None
    comparison: Comparison | None
    problems: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model.as_dict(), "lineage": self.lineage and asdict(self.lineage),
            "certificate": self.certificate and self.certificate.as_dict(),
            "comparison": self.comparison and self.comparison.as_dict(), "problems": dict(self.problems),
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A source, what it was grown into, and training runs."""

    gdagrow: str
    tokens: Tokens
    source: ModelReport
    grown: tuple[GrownReport, ...]
    runs: tuple[TrainingRun, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        content = {
            "gdagrow": self.gdagrow, "tokens": asdict(self.tokens), "source": self.source.as_dict(),
            "grown": [grown.as_dict() for grown in self.grown], "runs": [asdict(run) for run in self.runs],
        }  # fmt: skip
        finite: dict[str, Any] = _plain(content)
        return finite


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
