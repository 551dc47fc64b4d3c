"""FedGA: give more weight to sites that lose more when their model is averaged with the others.

Source: Zhang et al., "Federated Domain Generalization with Generalization Adjustment", CVPR 2023, and its official code.
The local half is `LossProbe` in `clients/received_probe.py`.
Symbols: K sites, ω → weights, t counts rounds from 0 (t = round − 1), T → rounds, d → step, d_t = d (T − t) / T,
G_k → gap: loss of the global model after the previous round − training loss of the local model of that round,
h_k = G_k − mean G.

ω starts uniform, then ω ← ω + (d_t / K) · h / max|h|, clipped at 0 and normalised. The loss of the global model after a
round is known when the sites of the next one measure what they received, so a round's weights are set when its replies
are there; the training loss waits in the state.
The step: the paper centres the gaps and adds d_t · h / max|h|, whatever K is (`per_site: false`). The official code does
not centre, and divides the step by 3, the number of sites in its experiments. The FedISM repository, which this follows
by default, centres and divides by K.

Departures: the official code compares scores on validation data before and after averaging. Here, as in the FedISM
repository, losses on the training split are compared. The local one is the mean over the steps of training (augmented,
add-on terms included), so it lies above the loss of the trained model; centring takes away what this has in common.
A site whose loss of the previous round is missing or not finite: h = 0; max|h| = 0: no change. Absent sites keep their
weight; a newcomer holds the mean share of the sites heard so far.
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
class FedGAParams:
    """Constants of the method."""

    step: float = 0.05  # d in (0, 1) (FedISM repository; the official code has 0.2)
    per_site: bool = True  # divide the step by K (both repositories, one with K = 3); false: as in the paper

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise ValueError(f"0 < step < 1 expected, got {self.step}")


@dataclass(frozen=True)
class FedGAState:
    """Weights ω by site, Σ = 1, and the training losses of the previous round by site (finite ones only)."""

    weights: dict[str, float] = field(default_factory=dict)
    train_loss: dict[str, float] = field(default_factory=dict)


def step_size(round: int, rounds: int, step: float, num_sites: int = 1) -> float:
    """Step of a round: d_t / K with d_t = d (T − t) / T, t = round − 1, 1 ≤ round ≤ T. K = `num_sites` ≥ 1; 1: paper."""
    return step * (rounds - (round - 1)) / rounds / num_sites


def centred_gaps(global_loss: Floats, local_loss: Floats) -> Floats:
    """Centred generalisation gaps: h_k = G_k − mean G, G_k = global − local loss. (K,), (K,) → (K,); 0 for a site that
    lacks one of the two (NaN or infinite), which is left out of the mean.
    """
    known = np.isfinite(global_loss) & np.isfinite(local_loss)
    if not known.any():
        return np.zeros(len(known))
    gaps = np.where(known, global_loss, 0.0) - np.where(known, local_loss, 0.0)
    return np.where(known, gaps - gaps[known].mean(), 0.0)


def adjust(weights: Floats, gaps: Floats, step: float) -> Floats:
    """New weights: max(ω + step · h / max|h|, 0) over their sum. (K,), (K,) → (K,). max|h| = 0: ω."""
    largest = np.abs(gaps).max(initial=0.0)
    if largest == 0:
        return weights
    return normalise(np.maximum(weights + step * (gaps / largest), 0.0), weights)


class FedGA(Strategy):
    """Weights move with the generalisation gaps, by steps that shrink to the last round, so that the number of rounds is
    part of the method. Needs all K losses first: holds all K replies (K·S).
    """

    Params = FedGAParams
    State = FedGAState
    requires: ClassVar[tuple[str, ...]] = ("loss_received",)
    depends_on_rounds: ClassVar[bool] = True

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Adjust the weights by the gaps of the previous round and average; keep the training losses for the next."""
        received, history, before = list(updates), self.state.weights, self.state.train_loss
        sites = [update.site for update in received]
        train_loss = {update.site: reported(update, "train_loss") for update in received}
        train_loss = {site: loss for site, loss in train_loss.items() if math.isfinite(loss)}
        if not received:
            self.state = FedGAState(history, train_loss)
            return global_state
        weights, mass = restrict(history, sites, np.full(len(sites), 1.0 / max(len(history), 1)))
        gaps = centred_gaps(
            np.array([reported(update, "loss_received") for update in received]),
            np.array([before.get(site, math.nan) for site in sites]),
        )
        divisor = len(sites) if self.params.per_site else 1
        weights = adjust(weights, gaps, step_size(round, self.config.federation.rounds, self.params.step, divisor))
        self.state = FedGAState(remember(history, sites, weights, mass), train_loss)
        self.note_weights(dict(zip(sites, weights.tolist(), strict=True)))
        mean = weighted_mean(zip(weights.tolist(), (update.arrays for update in received), strict=True))
        return global_state if mean is None else {**global_state, **mean}
