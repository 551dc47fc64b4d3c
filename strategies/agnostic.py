"""Agnostic federated learning: train for the worst mixture of the sites.

Source: Mohri, Sivek, Suresh, "Agnostic Federated Learning", ICML 2019, arXiv 1902.00146, algorithm Stochastic-AFL:
min_w max_λ Σ_k λ_k F_k(w) over the simplex. The local half is `LossProbe` in `clients/received_probe.py`.
Symbols: K sites, F_k → loss of the received model at site k, λ → mixture, γ → step, w_k → trained models.

With γ, as in the paper, both players move from the same point: w steps by the λ before this round's ascent, then
λ ← Proj(λ + γ F) with the losses of the same received model. λ starts uniform. Without γ (the default): all weight on the
site with the largest F_k, the best response to the losses; the comparison in the FedISM repository does the same (q-FedAvg
on models at q ≥ 100).

Departures: the paper takes one gradient step of w per round, here the sites train as configured and their models are
averaged by λ; it gives back the average of all w^t, here the last one. Sites stand for the paper's domains. Absence: λ of
the replies is renormalised for mean and step, absent sites keep theirs; a newcomer holds the mean share of the sites
heard so far; if all that replied hold 0, they count as newcomers (uniform). A loss that is not finite: never the largest,
and in the step the mean of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedmed.federation.state import RunningMean
from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import Floats, remember, reported, restrict


@dataclass(frozen=True)
class AgnosticParams:
    """Constants of the method."""

    step: float | None = None  # γ > 0, ascent of the mixture (paper, tuned); null: all weight on the largest loss

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step > 0 or null expected, got {self.step}")


@dataclass(frozen=True)
class AgnosticState:
    """The mixture λ by site, Σ = 1; empty before the first round and without γ."""

    mixture: dict[str, float] = field(default_factory=dict)


def project_simplex(point: Floats) -> Floats:
    """Nearest point of {λ ≥ 0, Σ λ = 1} in the Euclidean norm: max(v − θ, 0), θ found by sorting. (K,) → (K,), finite.

    A constant added to all coordinates changes nothing. K = 0 stays empty.
    """
    if point.size == 0:
        return point
    descending = np.sort(point)[::-1] - point.max()  # relative to the largest, so that large values cost no digits
    thresholds = (np.cumsum(descending) - 1.0) / np.arange(1, point.size + 1)
    theta = thresholds[np.flatnonzero(descending > thresholds)[-1]]
    kept = np.maximum(point - point.max() - theta, 0.0)
    return np.asarray(kept / kept.sum())


def ascend(mixture: Floats, losses: Floats, step: float) -> Floats:
    """Step of the mixture: Proj(λ + γ F). (K,), (K,) → (K,). A loss that is not finite counts as the mean of the finite
    ones, which moves a site neither up nor down; none finite: λ.
    """
    with np.errstate(over="ignore"):  # what overflows counts as not finite
        ascent = step * losses
    known = np.isfinite(ascent)
    if not known.any():
        return mixture
    return project_simplex(mixture + np.where(known, ascent, ascent[known].mean()))


class AgnosticFL(Strategy):
    """Without γ: keeps the one reply with the largest loss so far, so two replies in memory (the first of equals wins).
    With γ: running sum by λ, and a uniform one for the case that all of λ is 0; one reply in memory.
    """

    Params = AgnosticParams
    State = AgnosticState
    requires: ClassVar[tuple[str, ...]] = ("loss_received",)

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """The worst site's model, or the mean by λ and a step of λ. Nobody to choose: the global model stays."""
        chosen = self._worst(updates) if self.params.step is None else self._mixed(updates, self.params.step)
        return global_state if chosen is None else {**global_state, **chosen}

    def _worst(self, updates: Iterable[Update]) -> dict[str, Tensor] | None:
        """Model of the site with the largest finite loss."""
        best: Update | None = None
        largest = -math.inf
        sites = []
        for update in updates:
            sites.append(update.site)
            loss = reported(update, "loss_received")
            if math.isfinite(loss) and loss > largest:
                best, largest = update, loss
            del update
        self.note_weights({site: float(best is not None and site == best.site) for site in sites})
        return None if best is None else best.arrays

    def _mixed(self, updates: Iterable[Update], step: float) -> dict[str, Tensor] | None:
        """Mean by the λ held before the round, then the step of λ."""
        history = self.state.mixture
        newcomer = 1.0 / max(len(history), 1)
        weighted, uniform = RunningMean(), RunningMean()
        losses: dict[str, float] = {}
        for update in updates:
            losses[update.site] = reported(update, "loss_received")
            weighted.add(update.arrays, history.get(update.site, newcomer))
            if weighted.empty:
                uniform.add(update.arrays, 1.0)
            del update
        sites = list(losses)
        if not sites:
            return None
        shares, mass = restrict(history, sites, np.full(len(sites), newcomer))
        stepped = ascend(shares, np.array(list(losses.values()), dtype=np.float64), step)
        self.state = AgnosticState(remember(history, sites, stepped, mass))
        self.note_weights(dict(zip(sites, shares.tolist(), strict=True)))
        return weighted.result() or uniform.result()
