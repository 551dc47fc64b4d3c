"""q-FedAvg: lean towards the sites on which the model does badly.

Source: Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, arXiv 1905.10497, algorithm 2 (q-FedAvg)
and its official code. The local half is `LossProbe` in `clients/received_probe.py`.
Symbols: K sites, w → before, w_k → after, F_k → loss of the received model (+ 1e-10 as in the official code),
L → lipschitz, Δw_k = L(w − w_k), Δ_k = F_k^q Δw_k, h_k = q F_k^{q−1} ‖Δw_k‖² + L F_k^q.

Rule `gradient` (paper): w ← w − Σ Δ_k / Σ h_k. L is the inverse of the local learning rate, a bound for plain SGD. With
Adam it is no bound but only a scale of the second term of h: at 1/lr that term can swallow the step, so tune it.
Rule `models` (the comparison in the FedISM repository): the local models are averaged with weights ∝ F_k^q.

Departures: only trainable parameters step; floating buffers get the mean by examples and counters the maximum. F_k^q is
kept relative to the largest one, so that no q over- or underflows. A site whose F_k is negative or not finite is left
out; nobody left: the global model stays. Squared norms are summed in float64.

Flower has a rule of this name (flwr.serverapp.strategy.QFedAvg, 1.41). It reads the metric `train_loss`, which our sites
measure during training and not on the received model; it steps all arrays alike, norm statistics included, and NumPy
refuses to scale integer counters in place, so a model with batch norm fails; it holds all replies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmed.federation.schedule import learning_rate
from fedmed.federation.state import RunningMean, weighted_mean, wide
from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import Floats, reported

EPSILON = 1e-10  # added to every loss, so that 0^(q−1) is defined (official code)


@dataclass(frozen=True)
class QFedAvgParams:
    """Constants of the method."""

    q: float = 1.0  # q ≥ 0, strength of the fairness, 0: uniform mean (the paper tunes it by data set)
    lipschitz: float | None = None  # L > 0; null: 1 / optimizer.lr (paper, for SGD); tune it for Adam
    rule: str = "gradient"  # gradient (paper) | models: weights F^q on the local models (FedISM repository)

    def __post_init__(self) -> None:
        scale = self.lipschitz is None or 0 < self.lipschitz < math.inf
        if not (0 <= self.q < math.inf and scale and self.rule in ("gradient", "models")):
            raise ValueError(f"q >= 0, lipschitz > 0 or null, rule gradient or models expected, got {self}")


def usable(loss: float) -> bool:
    """Whether a reported loss can be raised to a power: finite and ≥ 0."""
    return math.isfinite(loss) and loss >= 0


def loss_weights(losses: Floats, q: float) -> Floats:
    """Weights of the sites: (F_k + 1e-10)^q / Σ, in logarithms. (K,) → (K,); 0 for losses that are not `usable`, all 0
    when none is.
    """
    valid = np.isfinite(losses) & (losses >= 0)
    if not valid.any():
        return np.zeros(len(losses))
    logs = np.log(np.where(valid, losses, 0.0) + EPSILON)
    powers = np.where(valid, np.exp(np.minimum(q * (logs - logs[valid].max()), 0.0)), 0.0)
    return np.asarray(powers / powers.sum())


def curvature(loss: float, squared_distance: float, q: float, lipschitz: float) -> float:
    """Second-order bound of a site over F^q: h_k / F_k^q = q ‖Δw_k‖² / F_k + L, ‖Δw_k‖² = L² · squared distance."""
    return q * lipschitz**2 * squared_distance / (loss + EPSILON) + lipschitz


class FairStep:
    """Running sums Σ Δ_k and Σ h_k, both divided by the largest F_k^q so far. Memory: one set of parameters.

    In: `before`, the parameters w that move. Sums are float32 (float64 for float64 entries). An entry that a site did
    not send counts as not moved there.
    """

    def __init__(self, before: Mapping[str, Tensor], q: float, lipschitz: float) -> None:
        self._before, self._q, self._lipschitz = before, q, lipschitz
        self._moved: dict[str, Tensor] = {}  # Σ F_k^q (w_k − w)
        self._bound = 0.0  # Σ h_k
        self._power = 0.0  # Σ F_k^q
        self._log_scale = -math.inf  # logarithm of the largest F_k^q

    @torch.no_grad()  # here and not around the loop over replies, in which the sites of one process train
    def add(self, after: Mapping[str, Tensor], loss: float) -> None:
        """Add the trained model of one site, whose `loss` is usable."""
        log_power = self._q * math.log(loss + EPSILON)
        if log_power > self._log_scale:
            shrink = math.exp(self._log_scale - log_power)
            self._moved = {name: value.mul_(shrink) for name, value in self._moved.items()}
            self._bound, self._power, self._log_scale = self._bound * shrink, self._power * shrink, log_power
        power = math.exp(log_power - self._log_scale)
        squared_distance = 0.0
        for name, value in self._before.items():
            if name in after:
                change = wide(after[name]) - wide(value)
                squared_distance += float(change.double().square().sum())
                if name not in self._moved:
                    self._moved[name] = torch.zeros_like(change)
                self._moved[name].add_(change, alpha=power)
        self._power += power
        self._bound += power * curvature(loss, squared_distance, self._q, self._lipschitz)

    @property
    def fraction(self) -> float:
        """How far the step goes towards the mean weighted by F_k^q: L Σ F_k^q / Σ h_k in (0, 1], 0 without sites."""
        return self._lipschitz * self._power / self._bound if self._bound > 0 else 0.0

    @torch.no_grad()
    def result(self) -> dict[str, Tensor] | None:
        """The new parameters w − Σ Δ_k / Σ h_k in their own dtype; None if no site was added."""
        if self._bound == 0.0:
            return None
        rate = self._lipschitz / self._bound
        return {n: (wide(self._before[n]) + rate * moved).to(self._before[n].dtype) for n, moved in self._moved.items()}


class QFedAvg(Strategy):
    """q-FedAvg. Rule `gradient`: two running sums, one reply in memory. Rule `models`: holds all K replies (K·S)."""

    Params = QFedAvgParams
    requires: ClassVar[tuple[str, ...]] = ("loss_received",)

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Combine by the chosen rule. Notes the shares of F_k^q as weights, and how far the step goes."""
        if self.params.rule == "models":
            received = list(updates)
            weights = self._weigh({update.site: reported(update, "loss_received") for update in received})
            mean = weighted_mean(zip(weights, (update.arrays for update in received), strict=True))
            return global_state if mean is None else {**global_state, **mean}
        optimizer = self.config.optimizer.name
        if round == 1 and self.params.lipschitz is None and self.params.q > 0 and optimizer != "sgd":
            self.log.warning("lipschitz = 1 / optimizer.lr is for sgd, not %s: set strategy.args.lipschitz", optimizer)
        return self._fair_step(round, global_state, updates)

    def _fair_step(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Rule `gradient`, one reply at a time."""
        lipschitz = self.params.lipschitz or 1.0 / learning_rate(
            self.config.optimizer, round, self.config.federation.rounds
        )
        before = {name: global_state[name] for name in self.layout.trainable if name in global_state}
        step, buffers, losses = FairStep(before, self.params.q, lipschitz), RunningMean(), {}
        for update in updates:
            losses[update.site] = loss = reported(update, "loss_received")
            if usable(loss):
                step.add(update.arrays, loss)
                buffers.add({n: v for n, v in update.arrays.items() if n not in before}, update.num_examples)
            del update
        moved = step.result()
        self._weigh(losses)
        self.note("step_fraction", step.fraction)
        return global_state if moved is None else {**global_state, **(buffers.result() or {}), **moved}

    def _weigh(self, losses: Mapping[str, float]) -> list[float]:
        """Note and give the share of each site in Σ F^q."""
        weights = loss_weights(np.array(list(losses.values()), dtype=np.float64), self.params.q).tolist()
        self.note_weights(dict(zip(losses, weights, strict=True)))
        return list(weights)
