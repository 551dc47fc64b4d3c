"""FedNova: updates are divided by the amount of local work before they are averaged.

Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
arXiv 2007.07481, without server momentum; `clients/step_count.py` is the local half.
Symbols: w → global parameters, w_k → update.arrays, n_k → num_examples, p_k = n_k / Σ n, τ_k → num_steps,
‖a_k‖₁ → work, ρ → momentum, τ_eff → effective steps. Rule: w ← w + τ_eff · Σ p_k (w_k − w) / ‖a_k‖₁.

Departures: adam and adamw count as ‖a_k‖₁ = τ_k, an approximation, since their steps are no fixed sum of gradients; so does
a proximal term, taken as part of the gradient; momentum is taken to start from 0, which `optimizer.persist` breaks.
Floating buffers get the mean by n_k and counters the maximum. `flwr.serverapp.strategy` (1.41) has no FedNova.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmed.config import OptimizerConfig
from fedmed.errors import UserError
from fedmed.federation.state import RunningMean
from fedmed.federation.strategy import Strategy, Update
from strategies.server_optimizer import updates_of


def local_work(num_steps: float, momentum: float = 0.0) -> float:
    """‖a‖₁ = [τ − ρ(1 − ρ^τ) / (1 − ρ)] / (1 − ρ), the total weight of the gradients of τ ≥ 0 steps; τ when ρ = 0.

    Raises `ValueError` outside 0 ≤ ρ < 1.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"0 <= momentum < 1 expected, got {momentum}")
    rest = 1.0 - momentum
    return (num_steps - momentum * (1.0 - math.pow(momentum, num_steps)) / rest) / rest


def effective_steps(num_examples: Sequence[float], work: Sequence[float]) -> float:
    """τ_eff = Σ p_k ‖a_k‖₁, p_k = n_k / Σ n. Nobody, or Σ n = 0: 0."""
    total = sum(num_examples)
    return sum(n * a for n, a in zip(num_examples, work, strict=True)) / total if total > 0 else 0.0


def step_gain(num_examples: Sequence[float], work: Sequence[float]) -> float:
    """Factor γ = τ_eff · Σ p_k / ‖a_k‖₁ of the step from w to the mean with weights n_k / ‖a_k‖₁.

    With W = Σ n_k/‖a_k‖₁ and that mean m: τ_eff Σ p_k (w_k − w)/‖a_k‖₁ = τ_eff · (W / Σ n) · (m − w). γ ≥ 1, and 1 when all
    sites worked equally. Work > 0. Nobody: 0.
    """
    total = sum(num_examples)
    rate = sum(n / a for n, a in zip(num_examples, work, strict=True)) / total if total > 0 else 0.0
    return effective_steps(num_examples, work) * rate


def normalised_step(
    before: Mapping[str, Tensor], mean: Mapping[str, Tensor], gain: float, names: Iterable[str]
) -> dict[str, Tensor]:
    """w + γ·(m − w) of the named entries present in `mean`, in float32 (float64 stays), given in the dtype of the inputs."""
    with torch.no_grad():
        step = updates_of(before, mean, names)
        return {
            name: (before[name].to(delta.dtype) + gain * delta).to(mean[name].dtype) for name, delta in step.items()
        }


def read_steps(metrics: Mapping[str, Any]) -> float | None:
    """τ_k of a reply; None if it is missing, not one finite number, or below 1: such a site has no direction to give."""
    value = metrics.get("num_steps")
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value >= 1 else None


def momentum_of(optimizer: OptimizerConfig) -> float:
    """ρ of the local optimiser: that of SGD, 0 for the others. Raises `UserError` for ρ ≥ 1."""
    momentum = optimizer.momentum if optimizer.name == "sgd" else 0.0
    if momentum >= 1.0:
        raise UserError(f"optimizer.momentum: FedNova needs a value < 1, got {momentum:g}")
    return momentum


class FedNova(Strategy):
    """Normalised averaging. Memory: one running sum and one reply; one number by site besides.

    A site without a step (τ_k of 0, NaN or missing) is left out, buffers included; nobody left: the global model stays.
    """

    requires: ClassVar[tuple[str, ...]] = ("num_steps",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing is sent; an optimiser that the rule cannot take is refused before anybody trains."""
        momentum_of(self.config.optimizer)
        return {}, {}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """One mean with weights n_k / ‖a_k‖₁ for parameters and n_k for the rest, then one step from the global model."""
        momentum, trainable = momentum_of(self.config.optimizer), set(self.layout.trainable)
        mean = RunningMean()
        num_examples: dict[str, float] = {}
        work: dict[str, float] = {}
        left_out: list[str] = []
        for update in updates:
            steps = read_steps(update.metrics)
            if steps is None:
                left_out.append(update.site)
            else:
                n, a = float(update.num_examples), local_work(steps, momentum)
                mean.add(update.arrays, {name: n / a if name in trainable else n for name in update.arrays})
                num_examples[update.site], work[update.site] = n, a
            del update
        self.note("left_out", left_out)
        result = mean.result()
        if result is None:
            return global_state
        sizes, amounts = list(num_examples.values()), list(work.values())
        moved = normalised_step(global_state, result, step_gain(sizes, amounts), self.layout.trainable)
        self._note_weights({site: n / work[site] for site, n in num_examples.items()}, effective_steps(sizes, amounts))
        return {**global_state, **result, **moved}

    def _note_weights(self, weights: Mapping[str, float], steps: float) -> None:
        total = sum(weights.values())
        shares = {site: weight / total for site, weight in weights.items()}
        self.note_weights(shares)
        self.note("effective_steps", steps)
