"""What gdagrow says when it cannot go on.

Every error that a user can cause is a `GdagrowError`: one sentence that says what is wrong, where, what was
expected, what was found, and what to do next. Commands print it without a traceback and exit with code 2.
"""

from typing import Final

# A file can be wrong in a million places, and a value in it be a million characters long.
_LONGEST: Final = 20_000
_END: Final = 500  # with what to do


class GdagrowError(ValueError):
    """A mistake in what the user asked for or gave, told in one sentence, an endless one cut in its middle."""

    def __str__(self) -> str:
        sentence = super().__str__()
        if len(sentence) <= _LONGEST:
            return sentence
        left_out = len(sentence) - _LONGEST
        return f"{sentence[: _LONGEST - _END]} ... ({left_out:,} characters are left out) ... {sentence[-_END:]}"


class RecipeError(GdagrowError):
    """The growth asked for is not a growth: a bad factor, an unknown key, nothing to do."""


class CheckpointError(GdagrowError):
    """A checkpoint directory cannot be read as one."""


class PlanError(GdagrowError):
    """The growth cannot be done on this checkpoint: heads that do not divide, tensors that do not fit."""


class OutputError(GdagrowError):
    """The output cannot be written: the target exists, the disk is full."""


class CompareError(GdagrowError):
    """Two checkpoints cannot be compared, or one cannot be measured."""


class ReportError(GdagrowError):
    """A report cannot be made: a package or a training run is missing."""


class TrainError(GdagrowError):
    """A training run cannot be started, gone on with, or kept up: bad data, a run of other settings, a loss of NaN."""


class DivergedError(TrainError):
    """A run's loss is not finite."""


class ResumeError(OutputError):
    """What an interrupted run left belongs to another growth than the one that is to go on."""
