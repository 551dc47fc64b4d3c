"""Prototypes of classes: sub-clusters in feature space, and a loss that asks every feature to be nearest to its own class.

N items, D features, C classes, K prototypes of a class, V classes that compete. Features and prototypes enter by their
direction only: u = f / max(‖f‖, 1e-12). Results keep the dtype of the features, the assignment works in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NO_DIRECTION = 1e-8  # a vector with a smaller norm points nowhere: its gradient would be scaled by 1 / norm
Assign = Callable[[Tensor], Tensor]


def usable(features: Tensor) -> Tensor:
    """Which features have a direction: a finite norm of at least `NO_DIRECTION`. (N, D) → (N,) bool."""
    norm = torch.linalg.vector_norm(features.detach(), dim=-1)
    found: Tensor = (norm >= NO_DIRECTION) & norm.isfinite()
    return found


def group_means(values: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean of the values of each group. In: finite (N, D), (N,) int64 in 0 … G−1. Out: (G, D), 0 for a group without
    items; (G,) counts in the dtype of the values.
    """
    # A product: a scattered sum is not repeatable on a GPU.
    member = F.one_hot(group, num_groups).to(values.dtype)
    counts = member.sum(dim=0)
    return (member.T @ values) / counts.clamp_min(1.0).unsqueeze(1), counts


def similarities(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of each feature and each prototype, u_n · P_ck/‖P_ck‖. In: (N, D), (C, K, D). Out: (N, K, C) in [−1, 1];
    0 for a zero vector.
    """
    return torch.einsum("nd,ckd->nkc", F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1))


def class_scores(similarity: Tensor) -> Tensor:
    """Score of each class, s_nc = max_k; of equal ones the gradient goes to one. (N, K, C) → (N, C)."""
    return similarity.max(dim=1).values


def normalised_logits(scores: Tensor) -> Tensor:
    """LayerNorm over the classes without scale and shift, l = (s − mean s) / √(var s + 1e-5), biased variance.

    (N, C) → (N, C). Equal scores give 0. No logit is above √(C − 1), so the loss below cannot reach 0 (`smallest_loss`).
    """
    return F.layer_norm(scores, scores.shape[1:])


def smallest_loss(num_classes: int) -> float:
    """What `npr_loss` cannot go below: own logit √(C − 1), the others −1/√(C − 1). C = 8: 0.293; one class: 0."""
    if num_classes < 2:
        return 0.0
    top = math.sqrt(num_classes - 1)
    return math.log1p((num_classes - 1) * math.exp(-(top + 1 / top)))


def npr_loss(features: Tensor, prototypes: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
    """L_npr: mean cross-entropy of the normalised logits. In: (N, D), (C, K, D), (N,) int64. Out: scalar.

    Features without direction are left out of the mean. `classes` (V,) int64: only these compete, and items of others
    are left out, too. 0 (with gradient 0) when no item is left or, with `classes` given, fewer than two compete.
    Prototypes are constants: the gradient goes to the features.
    """
    keep = usable(features)
    if classes is not None:
        place = torch.full((len(prototypes),), -1, dtype=torch.int64, device=labels.device)
        place[classes] = torch.arange(len(classes), device=labels.device)
        labels, prototypes = place[labels], prototypes.index_select(0, classes)
        keep, labels = keep & (labels >= 0), labels.clamp_min(0)
    # Replaced, not multiplied by 0: the gradient of a direction is infinite at 0, and 0 · ∞ would be NaN.
    safe = torch.where(keep.unsqueeze(1), features, torch.zeros_like(features))
    if classes is not None and len(classes) < 2:
        return safe.sum() * 0.0
    logits = normalised_logits(class_scores(similarities(safe, prototypes.detach().to(safe))))
    weight = keep.to(logits.dtype)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * weight).sum() / weight.sum().clamp_min(1.0)


def sinkhorn_plan(similarity: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Balanced soft assignment of items to sub-clusters (Sinkhorn–Knopp between uniform marginals).

    In: similarity (N, K), ε > 0, iterations ≥ 1. Q = exp(S/ε)ᵀ over its sum; then so many times: every row (sub-cluster)
    to the sum 1/K, every column (item) to 1/N. Out: N·Qᵀ, (N, K) float64, rows sum to 1. Done on logarithms, so that a
    small ε leaves no row of zeros to divide by.
    """
    if not (epsilon > 0 and iterations >= 1):
        raise ValueError(f"epsilon > 0 and iterations >= 1 expected, got {epsilon} and {iterations}")
    n, k = similarity.shape
    if n == 0:
        return similarity.double()
    log_q = similarity.double() / epsilon
    log_q = log_q - log_q.flatten().logsumexp(dim=0)
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True) - math.log(k)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True) - math.log(n)
    return (log_q + math.log(n)).exp()


def hard_assignment(plan: Tensor) -> Tensor:
    """Sub-cluster of each item, the first of equal ones. (N, K) → (N,) int64 in 0 … K−1."""
    return plan.argmax(dim=1)


def update_prototypes(features: Tensor, assignment: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """New prototypes of one class: the direction of the mean of the directions assigned to each sub-cluster.

    In: (N, D), (N,) int64 in 0 … K−1, (K, D). A sub-cluster without item, or whose items cancel (norm of the mean below
    `NO_DIRECTION`), keeps its previous one. Out: (K, D) of norm 1 where new; (K,) bool, which are new.
    """
    means, counts = group_means(F.normalize(features, dim=-1), assignment, len(previous))
    new = (counts > 0) & (means.norm(dim=-1) >= NO_DIRECTION)
    return torch.where(new.unsqueeze(1), F.normalize(means, dim=-1), previous), new


def refresh_prototypes(features: Tensor, labels: Tensor, prototypes: Tensor, assign: Assign) -> tuple[Tensor, Tensor]:
    """Prototypes of all classes from all features of a site. In: (N, D), (N,) int64, (C, K, D); `assign` maps similarity
    (n, K) to sub-clusters (n,) int64.

    Features without direction are left out; a class with fewer than two others keeps its prototypes. Out: (C, K, D) in
    the dtype of `prototypes`; (C,) bool, classes with a new prototype.
    """
    keep = usable(features)
    features, labels = features[keep].to(prototypes), labels[keep].to(prototypes.device)
    rows, renewed = [], []
    for c, previous in enumerate(prototypes):
        own = features[labels == c]
        if len(own) < 2:
            rows.append(previous)
            renewed.append(False)
            continue
        updated, new = update_prototypes(own, assign(similarities(own, previous.unsqueeze(0))[:, :, 0]), previous)
        rows.append(updated)
        renewed.append(bool(new.any()))
    return torch.stack(rows), torch.tensor(renewed, device=prototypes.device)
