"""FedProx: a pull of the local model towards the received one, as an add-on for any client.

Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127, equation 2.
Symbols: w → trainable parameters, w^t → received parameters, μ → mu. Term: (μ/2)·‖w − w^t‖², the squared norm, 0 at the
first step of a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedmed.data.split import Batch
from fedmed.federation.client import AddOn, Client
from fedmed.losses.proximal import proximal_term
from fedmed.models.output import Output


@dataclass(frozen=True)
class ProximalParams:
    """Constants of the term."""

    enabled: bool = False
    mu: float = 0.01  # μ ≥ 0 (paper tries 0.001, 0.01, 0.1, 1)

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"mu >= 0 expected, got {self.mu}")


class Proximal(AddOn):
    """Adds the term `prox`. Parameters that did not come with the message (personal, frozen) are left out."""

    Params = ProximalParams

    def begin_round(self, client: Client, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Keep an own copy of the received parameters on the device: the model trains in its buffers."""
        names = [name for name, p in client.model.named_parameters() if p.requires_grad and name in client.received]
        self.reference = {name: client.received[name].detach().to(client.device, copy=True) for name in names}

    def loss(self, client: Client, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """(μ/2)·‖w − w^t‖² over the received trainable parameters."""
        parameters = {name: p for name, p in client.model.named_parameters() if name in self.reference}
        return {"prox": proximal_term(parameters, self.reference, self.params.mu)} if parameters else {}
