"""Muon for the matrices of the layers, AdamW for all else, as one optimizer with one state and one rate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from gdagrow.errors import TrainError
from gdagrow.train.parameters import layer_of
from gdagrow.train.recipe import OptimizerSettings


class MuonAndAdamW(Optimizer):
    """Torch's Muon and AdamW behind one `param_groups` and one `state`, which are all that engines save and load.

    The groups name their parameters (`param_names`): matrices of the layers under Muon, then under AdamW the other
    matrices, and what is not decayed. Muon's step is scaled to the size of AdamW's, so that one rate fits both.

    Source: Muon (Jordan et al., 2024); the scale is that of Moonlight (arXiv:2502.16982).
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        """Raises TrainError if torch is too old to have Muon."""
        if not hasattr(torch.optim, "Muon"):
            raise TrainError("optimizer muon needs torch 2.9 or newer; update torch, or take adamw")
        named: list[list[tuple[str, nn.Parameter]]] = [[], [], []]
        for name, parameter in model.named_parameters():
            kind = 2 if parameter.dim() != 2 else 0 if layer_of(name) is not None else 1
            named[kind].append((name, parameter))
        rate, decay = settings.learning_rate, settings.weight_decay
        self._muon = torch.optim.Muon(named[0], rate, decay, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw")
        rest = [{"params": named[1], "weight_decay": decay}, {"params": named[2], "weight_decay": 0.0}]
        self._adamw = AdamW([group for group in rest if group["params"]], rate, settings.betas, settings.eps)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both; there is no closure."""
        assert closure is None
        for optimizer, has_betas in ((self._muon, False), (self._adamw, True)):
            # Whoever loads a state or scales rates puts other groups in place.
            groups: list[dict[str, Any]] = [group for group in self.param_groups if ("betas" in group) is has_betas]
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer.step()  # type: ignore[no-untyped-call, unused-ignore]
