"""The processes of a run, as `torchrun` and `accelerate launch` start them."""

import os
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from gdagrow.train.recipe import TrainRecipe

# The first process may tokenise and grow for long while the others wait.
_PATIENCE: Final = timedelta(days=2)


def on_cpu(recipe: TrainRecipe) -> bool:
    """Whether a run computes on CPUs: because it shall, or because there is nothing else."""
    return recipe.device == "cpu" or not torch.accelerator.is_available()


class Processes:
    """This process among those of the run.

    number: Counted from 0 over all machines. count: Of all.
    """

    def __init__(self, recipe: TrainRecipe) -> None:
        self.number = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._on_cpu = on_cpu(recipe)
        self._patient: Any = None

    def meet(self) -> None:
        """Begin to talk with the others; one that ends before all have met leaves them without a word."""
        if self.count > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            PartialState(cpu=self._on_cpu)
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.number == 0

    def wait(self) -> None:
        """Go on when all have come here, however long the first takes."""
        if self.count > 1:
            dist.barrier(group=self._patient)

    def leave(self) -> None:
        """End the talk with the others."""
        if self.count > 1:
            dist.destroy_process_group()
