"""FairFed: trust those sites less whose measure is far from the global one.

Source: Ezzeldin et al., "FairFed: Enabling Group Fairness in Federated Learning", AAAI 2023, arXiv 2110.00857.
The local half is `AccuracyProbe` in `clients/received_probe.py`.
Symbols: K sites, n_k → num_examples, A_k → accuracy (balanced, of the received model on the local training split),
Ā = Σ A_j n_j / Σ n_j → global accuracy, Δ_k = |A_k − Ā| → gap, ω → weights, β → beta.

What is fair here: FairFed as published compares a measure of fairness between sensitive groups (such as sex or age) and
takes the accuracy only where that measure is undefined. Site files know no sensitive groups, so here, as in the
comparison in the FedISM repository, the measure is the accuracy of a site: this is fairness between sites, not between
groups.

Departures: negative weights are clipped to 0 before they are normalised (as the FedISM repository does), because a mean
with a negative weight can leave the range of the models. The FedISM repository forgets the sum in Ā and compares A_k with
its own share A_k n_k / N; here the sum is taken. Weights of the replies are renormalised, absent sites keep theirs; a
newcomer holds n_k / Σ n of the replies. A_k not finite: Δ_k = mean Δ, no change. All weights 0: n_k / Σ n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedmed.federation.state import weighted_mean
from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import Floats, normalise, remember, reported, restrict


@dataclass(frozen=True)
class FairFedParams:
    """Constants of the method."""

    beta: float = 1.0  # β ≥ 0, how much a gap costs; 0: the weights of round 1 stay (the paper tunes it)

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta >= 0 expected, got {self.beta}")


@dataclass(frozen=True)
class FairFedState:
    """Weights ω by site, Σ = 1; empty before the first round."""

    weights: dict[str, float] = field(default_factory=dict)


def accuracy_gaps(accuracy: Floats, num_examples: Floats) -> Floats:
    """Gaps to the global accuracy: Δ_k = |A_k − Ā|, Ā = Σ A_j n_j / Σ n_j over the sites with a finite A. (K,), (K,) with
    n > 0 → (K,). A site without finite A gets the mean of the others; nobody has one: 0.
    """
    known = np.isfinite(accuracy)
    if not known.any():
        return np.zeros(len(accuracy))
    overall = np.average(accuracy[known], weights=num_examples[known])
    gaps = np.abs(accuracy - overall)
    return np.asarray(np.where(known, gaps, gaps[known].mean()))


def adapt(weights: Floats, gaps: Floats, beta: float, shares: Floats) -> Floats:
    """New weights: max(ω_k − β (Δ_k − mean Δ), 0) over their sum. (K,) each; all 0: `shares`."""
    if weights.size == 0:
        return weights
    return normalise(np.maximum(weights - beta * (gaps - gaps.mean()), 0.0), shares)


class FairFed(Strategy):
    """Round 1: FedAvg's weights; later they move with the accuracy gaps. Needs all K accuracies first: holds all K
    replies (K·S).
    """

    Params = FairFedParams
    State = FairFedState
    requires: ClassVar[tuple[str, ...]] = ("bacc_received",)
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Adapt the weights to this round's accuracies and average."""
        received = list(updates)
        if not received:
            return global_state
        history, sites = self.state.weights, [update.site for update in received]
        num_examples = np.array([update.num_examples for update in received], dtype=np.float64)
        shares = normalise(num_examples, np.ones(len(received)))
        weights, mass = restrict(history, sites, shares)
        if history:
            accuracy = np.array([reported(update, "bacc_received") for update in received])
            weights = adapt(weights, accuracy_gaps(accuracy, num_examples), self.params.beta, shares)
        self.state = FairFedState(remember(history, sites, weights, mass))
        self.note_weights(dict(zip(sites, weights.tolist(), strict=True)))
        mean = weighted_mean(zip(weights.tolist(), (update.arrays for update in received), strict=True))
        return global_state if mean is None else {**global_state, **mean}
