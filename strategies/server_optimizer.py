"""Server optimisers: the mean update of a round is taken as a gradient.

FedAvgM: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
2019, arXiv 1909.06335. FedAdam: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295,
algorithm 2. The local half is any client.
Symbols: w → global parameters, Δ_t = mean of the received parameters − w → update, m → first, v → second, η → lr.

Departures: only trainable parameters move; floating buffers (norm statistics) get the plain mean and counters the
maximum, because a step along a moment could make a variance negative. FedAdam starts from v = 0 (paper: v ≥ τ²).
No bias correction, as in the paper's algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedmed.federation.state import wide
from fedmed.federation.strategy import Strategy, Update


@dataclass(frozen=True)
class FedAvgMParams:
    """Constants of FedAvgM."""

    lr: float = 1.0  # η > 0, 1 is plain averaging when momentum is 0 (paper)
    momentum: float = 0.9  # β in [0, 1) (paper)

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.momentum < 1):
            raise ValueError(f"lr > 0 and 0 <= momentum < 1 expected, got {self.lr}, {self.momentum}")


@dataclass(frozen=True)
class FedAdamParams:
    """Constants of FedAdam."""

    lr: float = 0.01  # η > 0; the paper tunes it per task between 1e-3 and 1 (our choice of the middle)
    beta1: float = 0.9  # β₁ in [0, 1) (paper)
    beta2: float = 0.99  # β₂ in [0, 1) (paper)
    tau: float = 1e-3  # τ > 0, the adaptivity (paper)

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.tau > 0):
            raise ValueError(f"lr > 0, 0 <= beta1, beta2 < 1 and tau > 0 expected, got {self}")


@dataclass(frozen=True)
class MomentState:
    """Moments by parameter name (float32, float64 for float64), empty before the first round, and the rounds done."""

    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)  # FedAdam only
    step: int = 0


def updates_of(before: Mapping[str, Tensor], mean: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Mean update Δ = mean − w of the named parameters present in both, in float32 (float64 stays)."""
    return {name: wide(mean[name]) - wide(before[name]) for name in names if name in mean}


def moment(
    previous: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float, gain: float
) -> dict[str, Tensor]:
    """decay · previous + gain · value for each entry; an entry without previous starts from 0."""
    return {
        name: gain * value + (decay * previous[name] if name in previous else 0.0) for name, value in values.items()
    }


def momentum_step(first: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
    """Step of FedAvgM: η·m."""
    return {name: lr * value for name, value in first.items()}


def adam_step(first: Mapping[str, Tensor], second: Mapping[str, Tensor], lr: float, tau: float) -> dict[str, Tensor]:
    """Step of FedAdam: η·m / (√v + τ), τ > 0."""
    return {name: lr * value / (second[name].sqrt() + tau) for name, value in first.items()}


class ServerOptimizer(Strategy):
    """FedAvg, then a step of the server's optimiser on the trainable parameters. Memory: running sum and moments."""

    State = MomentState

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Average, take Δ as the direction and step from the old parameters; everything else is the average."""
        mean: dict[str, Tensor] = super().aggregate(round, global_state, updates)
        if mean is global_state:  # nobody with a weight: no direction to step in
            return global_state
        with torch.no_grad():
            self.state, step = self.advance(self.state, updates_of(global_state, mean, self.layout.trainable))
            moved = {name: (wide(global_state[name]) + delta).to(mean[name].dtype) for name, delta in step.items()}
        return {**mean, **moved}

    def advance(self, state: Any, delta: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Give the new moments and the step to add to the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must say how it steps: override advance(state, delta)")


class FedAvgM(ServerOptimizer):
    """Server momentum: m ← β·m + Δ, w ← w + η·m. One reply in memory besides the running sum, and one moment."""

    Params = FedAvgMParams

    def advance(self, state: MomentState, delta: dict[str, Tensor]) -> tuple[MomentState, dict[str, Tensor]]:
        """One momentum step."""
        first = moment(state.first, delta, decay=self.params.momentum, gain=1.0)
        return MomentState(first, {}, state.step + 1), momentum_step(first, self.params.lr)


class FedAdam(ServerOptimizer):
    """Server Adam: m ← β₁·m + (1 − β₁)·Δ, v ← β₂·v + (1 − β₂)·Δ², w ← w + η·m / (√v + τ). Memory: as FedAvgM, two moments."""

    Params = FedAdamParams

    def advance(self, state: MomentState, delta: dict[str, Tensor]) -> tuple[MomentState, dict[str, Tensor]]:
        """One Adam step."""
        p = self.params
        first = moment(state.first, delta, decay=p.beta1, gain=1.0 - p.beta1)
        squares = {name: value.square() for name, value in delta.items()}
        second = moment(state.second, squares, decay=p.beta2, gain=1.0 - p.beta2)
        return MomentState(first, second, state.step + 1), adam_step(first, second, p.lr, p.tau)
