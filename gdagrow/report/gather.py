"""Measure everything that a report says, one checkpoint after the other; no model is ever whole in memory."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

import gdagrow
from gdagrow.archs import Sizes, architecture_of
from gdagrow.checkpoint import read_checkpoint
from gdagrow.costs import checkpoint_figures
from gdagrow.errors import CompareError, GdagrowError
from gdagrow.header import Header
from gdagrow.record import growths_of
from gdagrow.report.data import GrownReport, HeadLineage, ModelReport, Report, Tokens
from gdagrow.report.training import TrainingRun
from gdagrow.verify.attention import AttentionStats, attention_stats
from gdagrow.verify.clones import clone_similarity
from gdagrow.verify.lineage import lineage_of
from gdagrow.verify.logits import compare
from gdagrow.verify.pair import read_pair
from gdagrow.verify.weights import check_weights

# Tokens that both models write, greedily, to be compared.
NUM_DECODED: Final = 4

Progress = Callable[[str], None]
_T = TypeVar("_T")


def gather(
    source: Path,
    grown: Sequence[Path],
    tokens: Tensor,
    *,
    origin: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    runs: Sequence[TrainingRun] = (),
    progress: Progress | None = None,
) -> Report:
    """Measure a source and what it was grown into.

    A checkpoint that cannot be read ends it. What cannot be measured of one that can (a model that cannot be run, sizes
    that do not fit the source) is left out, and the report says why.

    Args:
        source: Checkpoint directory.
        grown: Directories of what it was grown into; there may be none.
        tokens: int64 `[seqs, length]` to run the models on.
        origin: Where the tokens come from, in words.
        dtype: Dtype of the arithmetic.
        device: Where it is done.
        runs: Training runs to show.
        progress: Told what is being done.

    Raises:
        CheckpointError: a checkpoint or its `growth.json` cannot be read.
    """
    measure = _Measure(source, tokens, dtype, device, progress or (lambda _: None))
    checkpoints = [_Checkpoint(path) for path in (source, *grown)]
    return Report(
        gdagrow=gdagrow.__version__,
        tokens=Tokens(origin, len(tokens), tokens.shape[1], str(dtype).removeprefix("torch.")),
        source=measure.model(checkpoints[0]),
        grown=tuple(measure.grown(checkpoints[0], checkpoint) for checkpoint in checkpoints[1:]),
        runs=tuple(runs),
    )


class _Checkpoint:
    """What is read of a checkpoint before any measuring."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = Path(os.path.abspath(directory)).name
        self.header: Header = read_checkpoint(directory)
        self.architecture = architecture_of(self.header.config).name
        self.figures = checkpoint_figures(self.header)
        self.growths = tuple(growths_of(directory))

    @property
    def sizes(self) -> Sizes:
        return self.figures.sizes


class _Measure:
    """Measures against one source on the same tokens."""

    def __init__(self, source: Path, tokens: Tensor, dtype: torch.dtype, device: str, tell: Progress) -> None:
        self._source, self._tokens, self._dtype, self._device, self._tell = source, tokens, dtype, device, tell

    def model(self, checkpoint: _Checkpoint) -> ModelReport:
        problems: dict[str, str] = {}
        tell = self._teller(checkpoint)
        attention = _try("attention", problems, lambda: self._attention(checkpoint, tell))
        clones = _try("clones", problems, lambda: clone_similarity(checkpoint.directory, progress=tell))
        return ModelReport(
            name=checkpoint.name, directory=str(checkpoint.directory),
            architecture=checkpoint.architecture, figures=checkpoint.figures,
            growths=checkpoint.growths, attention=attention, clones=clones, problems=problems,
        )  # fmt: skip

    def grown(self, source: _Checkpoint, checkpoint: _Checkpoint) -> GrownReport:
        problems: dict[str, str] = {}
        tell = self._teller(checkpoint)
        lineage = _try("lineage", problems, lambda: _heads(source.directory, checkpoint.directory))
        tell("checking weights")
        certificate = _try("certificate", problems, lambda: check_weights(source.directory, checkpoint.directory))
        comparison = _try("comparison", problems, lambda: compare(
            source.directory, checkpoint.directory, self._tokens, dtype=self._dtype, device=self._device,
            num_decoded=NUM_DECODED, progress=tell,
        ))  # fmt: skip
        return GrownReport(self.model(checkpoint), lineage, certificate, comparison, problems)

    def _attention(self, checkpoint: _Checkpoint, tell: Progress) -> AttentionStats:
        if int(self._tokens.max()) >= checkpoint.sizes.vocab:
            raise CompareError(
                f"{checkpoint.directory} has a vocabulary of {checkpoint.sizes.vocab} tokens, too few for those of "
                f"{self._source}"
            )
        return attention_stats(
            checkpoint.directory, self._tokens, dtype=self._dtype, device=self._device, progress=tell
        )

    def _teller(self, checkpoint: _Checkpoint) -> Progress:
        return lambda step: self._tell(f"{checkpoint.name}: {step}")


def _try(what: str, problems: dict[str, str], measure: Callable[[], _T]) -> _T | None:
    try:
        return measure()
    except GdagrowError as error:
        problems[what] = str(error)
        return None


def _heads(source: Path, grown: Path) -> HeadLineage:
    by_layer = lineage_of(*read_pair(source, grown)).maps.by_layer
    maps = by_layer[0]
    groups = tuple(maps.of("group", None))
    signal = tuple(tuple((old, head) for head in maps.of("signal", new)) for new, old in enumerate(groups))
    others = (layer for layer, found in enumerate(by_layer) if found.maps["signal"] != maps.maps["signal"])
    return HeadLineage(signal, groups, tuple(maps.of("kv", None)), tuple(others))
