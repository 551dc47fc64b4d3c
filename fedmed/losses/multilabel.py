"""Losses for multi-label data of which only some entries are annotated: prior-adjusted BCE and distillation of the rest.

B batch, C classes. An entry is a pair (item, class); masks are (B, C) bool, True = use. Logits and losses keep the dtype of
the logits. Every mean runs over the entries that are used, by their actual number; over no entry it is 0 with gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmed.losses.classification import binary_cross_entropy


def prior_shift(prior: Tensor, clip: float = 1e-6) -> Tensor:
    """Logit adjustment of a binary class, log π − log(1 − π), both clipped from below: finite for π = 0 and π = 1.

    prior π: any shape, in [0, 1], the share of positives; clip > 0, at least 1e-30 for float32. Out: the same shape. Then
    sigmoid(z + shift) = qπ / (qπ + (1 − q)(1 − π)) with q = sigmoid(z): the two-class form of `log_prior`.
    """
    return prior.clamp_min(clip).log() - (1.0 - prior).clamp_min(clip).log()


def masked_squared_error(logits: Tensor, teacher_logits: Tensor, use: Tensor) -> Tensor:
    """Mean of (q − q_g)² over the entries in use, q = sigmoid of the logits. (B, C) each, mask (B, C) → scalar."""
    error = (logits.sigmoid() - teacher_logits.sigmoid()).square()
    return torch.where(use, error, torch.zeros_like(error)).sum() / use.sum().clamp_min(1)


def two_view_terms(
    views: Sequence[Tensor],
    teacher_views: Sequence[Tensor],
    targets: Tensor,
    supervised: Tensor,
    shift: Tensor | None = None,
    consistency: float = 1.0,
) -> dict[str, Tensor]:
    """BCE on annotated entries and squared distance to a teacher on the others, each averaged over the views of a batch.

    views: V ≥ 1 logits (B, C); teacher_views: the teacher's logits of the same views, none to leave its term out; targets
    (B, C), read where `supervised` (B, C) is True; shift (C,) is added to the logits in the BCE only; consistency ≥ 0
    weighs the second term. Out: scalars `supervised`, `consistency`.
    """
    moved = [logits if shift is None else logits + shift for logits in views]
    found = {"supervised": torch.stack([binary_cross_entropy(z, targets, supervised) for z in moved]).mean()}
    if teacher_views:
        pairs = zip(views, teacher_views, strict=True)
        errors = torch.stack([masked_squared_error(z, g, ~supervised) for z, g in pairs])
        found["consistency"] = consistency * errors.mean()
    return found


def joint_terms(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, supervised: Tensor, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """The two parts of (Σ_supervised BCE + Σ_others (q − q_g)²) / number of entries, one mean over all entries.

    logits, teacher_logits, targets, supervised (B, C); shift (C,) is added to the logits in the BCE only. Targets are read
    where `supervised` is True. Out: scalars `supervised`, `distilled`.
    """
    share = supervised.sum().to(logits.dtype) / max(supervised.numel(), 1)
    bce = binary_cross_entropy(logits if shift is None else logits + shift, targets, supervised)
    return {
        "supervised": share * bce,
        "distilled": (1.0 - share) * masked_squared_error(logits, teacher_logits, ~supervised),
    }
