"""FedNova, local half: supervised training that says how many steps it took.

Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
arXiv 2007.07481; `strategies/normalized_averaging.py` is the server. Symbol: τ_k → num_steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from clients.supervised import Supervised
from fedmed.data.split import Batch
from fedmed.federation.messages import Leaf


class StepCount(Supervised):
    """Supervised training; τ_k is counted step by step, so `training.max_steps` and skipped batches are in it."""

    leaves: ClassVar[tuple[Leaf, ...]] = (Leaf("num_steps", "1", "optimiser steps of the round"),)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Count from zero."""
        super().begin_round(config, extras)
        self.num_steps = 0

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The base step, counted once it is done."""
        terms = super().train_step(batch, step)
        self.num_steps += 1
        return terms

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send τ_k."""
        return {}, {"num_steps": self.num_steps}
