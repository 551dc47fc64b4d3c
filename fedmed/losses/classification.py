"""Cross-entropies for single-label and multi-label classification (the first two also work per pixel).

B batch, C classes, L labels, * any spatial axes. Logits and losses keep the dtype of the logits; every loss is a mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy. logits (B, C, *), targets (B, *) int64 class ids. Out: scalar."""
    return F.cross_entropy(logits, targets)


def log_prior(class_counts: Tensor, eps: float | None = None) -> Tensor:
    """Logarithm of the class shares, ln(n_c / Σ n) or, with `eps`, ln(n_c / Σ n + eps).

    class_counts (C,), non-negative, any dtype. Out: (C,) float64 (the dtype of the counts when they are floating), -inf
    for an absent class unless `eps` is given. With no count at all the shares are equal.
    """
    counts = class_counts if class_counts.is_floating_point() else class_counts.double()
    total = counts.sum()
    equal = 1.0 / max(counts.numel(), 1)
    share = torch.where(total > 0, counts / total.clamp_min(torch.finfo(counts.dtype).tiny), equal)
    return (share if eps is None else share + eps).log()


def logit_adjusted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor | None = None,
    tau: float = 1.0,
    eps: float | None = None,
    *,
    prior: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of z + tau · ln π (logit adjustment, arXiv 2007.07314, eq. 10), π the class shares of the
    training data.

    logits z (B, C, *), targets (B, *) int64. Either class_counts (C,), turned into ln π by `log_prior(class_counts,
    eps)`, or `prior` (C,), that logarithm itself (to compute it once per run). eps None: FedNoRo, FedISM; 1e-9: FedNPR,
    FCA (balanced softmax). A class without examples (ln π = -inf) gets probability 0 and gradient 0. Its label cannot
    occur in data that agree with the counts; if it does, the loss is +inf (gradients stay finite). tau 0 is the plain
    cross-entropy. Out: scalar.
    """
    if (class_counts is None) == (prior is None):
        raise ValueError("give either class_counts or prior")
    if tau == 0:  # 0 · -inf would be NaN
        return F.cross_entropy(logits, targets)
    known = prior if prior is not None else log_prior(torch.as_tensor(class_counts), eps)
    shift = tau * known.to(device=logits.device, dtype=logits.dtype)
    return F.cross_entropy(logits + shift.view(1, -1, *(1,) * (logits.ndim - 2)), targets)


def binary_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy with logits over all entries, or over those where `mask` is 1 (0 when there are none).

    logits (B, L, *), targets of the same shape in [0, 1], mask broadcastable, bool or 0/1 (1 = use). Out: scalar.
    """
    target = targets.to(logits.dtype)
    if mask is None:
        return F.binary_cross_entropy_with_logits(logits, target)
    weight = mask.to(logits.dtype).expand_as(logits)
    # A left-out target may be NaN (unknown); NaN · 0 would still be NaN.
    target = torch.where(weight > 0, target, torch.zeros_like(target))
    total = F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="sum")
    return total / weight.sum().clamp_min(1.0)
