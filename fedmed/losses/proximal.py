"""The proximal term of FedProx (arXiv 1812.06127)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def squared_distance(parameters: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """Sum over all entries of ‖w - w_ref‖², squared Euclidean norms, not norms.

    parameters: name -> tensor (require gradients); reference: at least the same names and shapes, treated as constants.
    Out: scalar of the parameters' dtype and device, 0 for no parameters.
    """
    terms = [(value - reference[name].detach().to(value)).square().sum() for name, value in parameters.items()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def proximal_term(parameters: Mapping[str, Tensor], reference: Mapping[str, Tensor], mu: float) -> Tensor:
    """mu / 2 · ‖w - w_ref‖² (FedProx, eq. 2), gradient mu · (w - w_ref): 0 at the start of a round. Arguments:
    `squared_distance`.
    """
    return 0.5 * mu * squared_distance(parameters, reference)
