"""FedBN: normalisation layers stay at the site, everything else is averaged.

Source: Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021, arXiv
2102.07623. The server rule is FedAvg. A site is judged by the received model with its own normalisation entries; a
global model does not exist, because the server never sees these entries.

Departure: all normalisation layers with entries (batch, instance, group, layer); the paper has batch norms only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from clients.supervised import Supervised
from fedmed.errors import UserError

NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # the first is the base of batch and instance norms


class LocalNorm(Supervised):
    """Supervised training whose normalisation entries (weights, biases, statistics, counters) are personal."""

    views: ClassVar[tuple[str, ...]] = ("personal",)

    @staticmethod
    def is_personal(name: str, module: nn.Module) -> bool:
        """True for every entry of a normalisation module."""
        return isinstance(module, NORMALISATION)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Refuse a model without normalisation: the method would silently be FedAvg."""
        super().begin_round(config, extras)
        if not self.layout.personal:
            raise UserError(
                f"FedBN keeps normalisation layers at the site, but model {self.config.model.name!r} has none; "
                "choose a model with normalisation, or the plain client (client.name=supervised)"
            )
