"""FedNoRo, local half: logit-adjusted training, and distillation from the received model at sites believed noisy.

Source: Wu et al., IJCAI 2023, arXiv 2305.05230, and its official code; see `strategies/noise_robust.py` for the server.
Symbols: z_S, z_T → student and teacher logits (B, C), π_k → class prior of the site, τ → tau, λ_t → kd_weight,
s → soft label, ℓ → log-probability of the student. The prior is added to the student only; the temperature divides the
teacher's logits only, and there is no factor T² (official code).

Departures: the class losses for the identification are measured without augmentation (official: training transform).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.data.split import Batch
from fedmed.federation.client import Client
from fedmed.federation.messages import Leaf
from fedmed.losses.classification import log_prior, logit_adjusted_cross_entropy
from fedmed.models.output import Output


@dataclass(frozen=True)
class NoiseRobustParams:
    """Constants of the local half; defaults are the official code's unless marked."""

    tau: float = 1.0  # τ ≥ 0, strength of the logit adjustment; 0 is plain cross-entropy
    temperature: float = 0.8  # > 0, divides the teacher's logits
    min_count: int = 1  # m₀ ≥ 1: a class with fewer items is reported as absent (our option; 1 is official)

    def __post_init__(self) -> None:
        if not (self.tau >= 0 and self.temperature > 0 and self.min_count >= 1):
            raise ValueError(f"tau >= 0, temperature > 0 and min_count >= 1 expected, got {self}")


def class_mean_losses(losses: Tensor, labels: Tensor, num_classes: int, min_count: int = 1) -> npt.NDArray[np.float64]:
    """Mean loss of each class, L_{k,c}. In: (n,), (n,) int64. Out: (C,) float64, NaN for a class with fewer than
    `min_count` items, +inf for one whose mean is not finite.
    """
    values, classes = losses.detach().double().cpu().numpy(), labels.cpu().numpy()
    counts = np.bincount(classes, minlength=num_classes)
    sums = np.bincount(classes, weights=values, minlength=num_classes)
    means = np.where(counts > 0, sums, np.nan) / np.maximum(counts, 1)
    means = np.where((counts > 0) & ~np.isfinite(means), np.inf, means)
    return np.asarray(np.where(counts >= min_count, means, np.nan))


def soft_labels(teacher_logits: Tensor, temperature: float = 0.8) -> Tensor:
    """Teacher's labels: s = softmax(z_T / temperature). (B, C) → (B, C), rows sum to 1."""
    return F.softmax(teacher_logits / temperature, dim=1)


def adjusted_log_prob(logits: Tensor, class_counts: Tensor, tau: float = 1.0) -> Tensor:
    """Student's log-probabilities with the prior: ℓ = log_softmax(z_S + τ·ln π_k), infinite entries replaced by 0.

    In: (B, C), (C,) counts. An absent class has ln π = −∞; with 0 in its place it carries no gradient (official rule).
    """
    shift = tau * log_prior(class_counts).to(logits) if tau > 0 else torch.zeros_like(logits[0])
    log_prob = F.log_softmax(logits + shift, dim=1)
    return log_prob.masked_fill(log_prob.isinf(), 0.0)


def kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    kd_weight: float,
    temperature: float = 0.8,
    tau: float = 1.0,
) -> dict[str, Tensor]:
    """The two terms of the loss at a noisy site: λ·KL(s ‖ ℓ) and (1 − λ)·mean_b(−ℓ_{b, y_b}).

    In: logits (B, C), labels (B,) int64, counts (C,), λ in [0, 1]. KL = (1/B) Σ_b Σ_c s (ln s − ℓ), 0·ln 0 = 0; it can
    be negative when a class is absent at the site (its ℓ is 0).
    """
    soft = soft_labels(teacher_logits, temperature)
    log_prob = adjusted_log_prob(student_logits, class_counts, tau)
    kl = (torch.xlogy(soft, soft) - soft * log_prob).sum(dim=1).mean()
    return {"kd": kd_weight * kl, "nll": (1.0 - kd_weight) * F.nll_loss(log_prob, labels)}


class NoiseRobust(Client):
    """Trains by the role the server gives: clean sites with the logit-adjusted loss, noisy ones with distillation."""

    Params = NoiseRobustParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf(
            "class_loss", "C", "mean training loss by class; NaN: fewer than client.args.min_count items of the class"
        ),
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Read role and weight. A label without a count would cost nothing in the distillation, so none may exist."""
        self.distil = int(config.get("stage", 1)) == 2 and config.get("role", "clean") == "noisy"
        self.kd_weight = float(config.get("kd_weight", 0.0))
        self.counts = torch.as_tensor(np.asarray(self.class_counts)).to(self.device)
        labels = self.train_set.targets.long()
        assert len(labels) == 0 or bool((self.counts[labels.to(self.device)] > 0).all()), (
            "labels and class counts differ"
        )

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """Loss of stage 1 and of clean sites, or distillation; the teacher sees the same augmented batch."""
        if not self.distil:
            return {"ce": logit_adjusted_cross_entropy(output.logits, batch.targets, self.counts, self.params.tau)}
        teacher = self.teacher(batch.images).logits
        params = self.params
        return kd_terms(
            output.logits, teacher, batch.targets, self.counts, self.kd_weight, params.temperature, params.tau
        )

    def query_class_losses(
        self, config: dict[str, Any], extras: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Plain cross-entropy of the received model on the site's own labels, averaged by class."""
        losses, labels = [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
        for batch, output in self.sweep("train"):
            losses.append(F.cross_entropy(output.logits.float(), batch.targets, reduction="none").cpu())
            labels.append(batch.targets.cpu())
        means = class_mean_losses(torch.cat(losses), torch.cat(labels), len(self.class_counts), self.params.min_count)
        return {}, {"class_loss": means.tolist()}
