"""Terms that tie two classifiers on the same features: consistency of the first with the second, and a focal loss.

B batch, C classes. Logits (B, C) of any floating type; every loss is a mean over the batch, 0 for an empty batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-11  # added to both probabilities by the released consistency


def anchored_kl(logits: Tensor, anchor_logits: Tensor) -> Tensor:
    """KL(p₂ ‖ p₁) = (1/B) Σ_b Σ_c p₂ (ln p₂ − ln p₁), p₂ = softmax(anchor_logits) a constant.

    In: (B, C) twice. Out: scalar ≥ 0; gradient (p₁ − p₂)/B to `logits`, none to `anchor_logits`.
    """
    target = F.log_softmax(anchor_logits.detach(), dim=1)
    divergence = F.kl_div(F.log_softmax(logits, dim=1), target, log_target=True, reduction="sum")
    return divergence / max(len(logits), 1)


def released_consistency(logits: Tensor, anchor_logits: Tensor) -> Tensor:
    """(1/(B·C)) Σ t (ln t − p₁ − 1e-11), t = p₂ + 1e-11: a KL routine fed with probabilities in place of logarithms.

    In: (B, C) twice. Out: scalar of either sign; its gradient to p₁ is −t/(B·C) everywhere, so that p₁ sharpens towards
    the class p₂ prefers and nothing vanishes where the two agree. None to `anchor_logits`.
    """
    target = F.softmax(anchor_logits.detach(), dim=1) + _TINY
    return (target * (target.log() - F.softmax(logits, dim=1) - _TINY)).sum() / max(logits.numel(), 1)


def focal_cross_entropy(logits: Tensor, targets: Tensor, gamma: float = 1.0) -> Tensor:
    """Focal loss, (1/B) Σ −(1 − p_y)^γ ln p_y (arXiv 1708.02002, eq. 4). gamma ≥ 0; 0 is the cross-entropy.

    logits (B, C), targets (B,) int64. Out: scalar.
    """
    loss = F.cross_entropy(logits, targets, reduction="none")
    if gamma > 0:
        # 1 − p_y without cancellation; the floor keeps the gradient of a root finite where p_y is 1.
        loss = (-(-loss).expm1()).clamp_min(1e-12) ** gamma * loss
    return loss.sum() / max(len(loss), 1)
