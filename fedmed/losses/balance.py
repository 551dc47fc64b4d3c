"""How much the loss terms of each modality count: the task-wise and gradient-wise balance of PASSION.

Source: Shi et al., ACM MM 2024, arXiv 2407.14796, and its official code. A modality whose student is further from the
teacher than the others lags behind; its terms are switched on (gate, every step) and grow (β, every round).
Symbols: M modalities, B batch, c → present, D → distance, D̄ → mean over the present modalities, RP → preference, r →
lag, a → gate, v → frequency, β → beta, η → eta, e → update (counts from 0).

Departures, all where the official code divides by 0 and then has NaN in every weight: an image with fewer than two
modalities, or with D̄ = 0, has no part in r; a modality that nobody has is left out of the mean distance, has RP = 0 and
v = 0; a mean distance of 0 gives RP = 0; with no modality measured β and η stay. ||β|| is √M (published: 2, M = 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BalanceParams:
    """Constants of the rule for β; defaults are the official code's."""

    eta: float = 0.01  # η ≥ 0 before the first update, step of β; 0 keeps β at 1
    eta_factor: float = 1.5  # > 0, η is multiplied by it before update 0 and then every `eta_period`
    eta_period: int = 100  # ≥ 1, in updates (published: epochs; here rounds)
    beta_min: float = 0.1  # > 0, least β before β is scaled to the norm √M
    beta_max: float = 4.0  # ≥ beta_min, largest

    def __post_init__(self) -> None:
        step = 0 <= self.eta < math.inf and 0 < self.eta_factor < math.inf and self.eta_period >= 1
        if not (step and 0 < self.beta_min <= self.beta_max < math.inf):
            raise ValueError(
                f"eta >= 0, eta_factor > 0, eta_period >= 1 and 0 < beta_min <= beta_max expected, got {self}"
            )


def task_lag(distance: Tensor, present: Tensor) -> Tensor:
    """r^m = Σ_b c_bm (D_bm / D̄_b - 1) = -Σ_b RP_bm. In: (B, M) twice, present 0/1. Out: (M,); 0 where no image counts."""
    has = present > 0
    count = has.sum(dim=1)
    mean = torch.where(has, distance, 0.0).sum(dim=1) / count.clamp_min(1)
    usable = (count >= 2) & (mean > 0) & mean.isfinite()  # a single modality is its own teacher: D = 0
    ratio = distance / torch.where(usable, mean, 1.0).unsqueeze(1)
    return torch.where(has & usable.unsqueeze(1), ratio - 1.0, 0.0).sum(dim=0)


def task_gate(lag: Tensor) -> Tensor:
    """a^m = 1 if r^m > 0 (the modality lags), else 0. (M,) → (M,) of the same dtype."""
    return (lag > 0).to(lag.dtype)


def frequency_weights(num_steps: int, counts: Tensor) -> Tensor:
    """v^m = steps per epoch / number of training items having m; 0 for a modality without any. (M,) → (M,) float64."""
    return torch.where(counts > 0, num_steps / counts.double().clamp_min(1.0), 0.0)


def balanced_terms(
    single: Tensor, pixel: Tensor, semantic: Tensor, present: Tensor, gate: Tensor, beta: Tensor, frequency: Tensor
) -> dict[str, Tensor]:
    """Σ_b Σ_m c a β v L_sep, Σ c β v L_pix and Σ c a v L_proto, under the names of the arguments.

    In: losses and presence (B, M); gate, β, v (M,). The loss of a modality that an image lacks is not read. Out: scalars.
    """

    def total(losses: Tensor, weight: Tensor) -> Tensor:
        return (torch.where(present > 0, losses, 0.0) * weight).sum()

    return {
        "single": total(single, gate * beta * frequency),
        "pixel": total(pixel, beta * frequency),
        "semantic": total(semantic, gate * frequency),
    }


def round_preference(distance: Tensor) -> Tensor:
    """RP^m = (mean D - D^m) / mean D, the mean over the measured modalities.

    In: (M,), not finite: not measured. Out: (M,); 0 for those, and for all if the mean is 0 (or nothing was measured).
    """
    known = distance.isfinite()
    mean = torch.where(known, distance, 0.0).sum() / known.sum().clamp_min(1)
    usable = known & (mean > 0)
    return torch.where(usable, 1.0 - distance / torch.where(mean > 0, mean, 1.0), 0.0)


def next_eta(eta: float, update: int, factor: float = 1.5, period: int = 100) -> float:
    """η of update e: multiplied by `factor` when e is a multiple of `period`, e = 0 included."""
    return eta * factor if update % period == 0 else eta


def next_beta(beta: Tensor, preference: Tensor, eta: float, beta_min: float = 0.1, beta_max: float = 4.0) -> Tensor:
    """β ← clamp(β - η RP), then scaled to ||β|| = √M: a modality that lags (RP < 0) grows. In and out: (M,), > 0."""
    moved = (beta - eta * preference).clamp(beta_min, beta_max)
    scaled: Tensor = moved * (math.sqrt(len(moved)) / moved.norm())
    return scaled


def update_balance(
    beta: Tensor, eta: float, update: int, distance: Tensor, params: BalanceParams
) -> tuple[Tensor, float]:
    """β and η after update e, from the distances (M,) of a round; both as they were if no modality was measured."""
    if not bool(distance.isfinite().any()):
        return beta, eta
    eta = next_eta(eta, update, params.eta_factor, params.eta_period)
    return next_beta(beta, round_preference(distance), eta, params.beta_min, params.beta_max), eta
