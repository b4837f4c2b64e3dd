"""The headers of a source and of what it grew into, held against their tables."""

from pathlib import Path

from gdagrow.archs import architecture_of
from gdagrow.checkpoint import read_checkpoint
from gdagrow.header import Header
from gdagrow.rows import claim
from gdagrow.views.convert import as_motif

HeaderPair = tuple[Header, Header]


def read_pair(source: Path, grown: Path) -> HeaderPair:
    """Read two checkpoints, the source in the layout in which it was grown: Motif's, if the grown one has that.

    Raises:
        CheckpointError: a checkpoint cannot be read, does not fit its table, or cannot be seen in Motif's layout.
    """
    before, after = read_checkpoint(source), read_checkpoint(grown)
    for header in (before, after):
        architecture = architecture_of(header.config)
        claim(header, architecture, architecture.sizes(header.config))
    is_motif = architecture_of(after.config).name == "motif"
    return (as_motif(before) if is_motif else before), after
