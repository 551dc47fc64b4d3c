"""Losses of sparsely annotated masks: only drawn pixels count.

B batch, C classes (class 0 is background), * spatial axes (any number). A pixel nobody labelled holds the ignore value,
by default C, one more than the last class. Labelled pixels are counted over the batch, not per image: an image with
many labels weighs more than one with few.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.segmentation import soft_dice_loss


def labelled_pixels(targets: Tensor, num_classes: int, ignore_value: int | None = None) -> Tensor:
    """Which pixels carry a label. targets (B, *) class ids; ignore_value None: `num_classes`. Out: (B, *) bool."""
    return targets != (num_classes if ignore_value is None else ignore_value)


def partial_cross_entropy(logits: Tensor, targets: Tensor, ignore_value: int | None = None) -> Tensor:
    """Cross-entropy over the labelled pixels of the batch: - Σ_labelled ln p[y] / max(number of labelled pixels, 1).

    logits (B, C, *), targets (B, *) class ids of any integer dtype; ignore_value None: C. No labelled pixel: loss 0 with
    gradient 0 (the mean of a framework is NaN there). Half precision is summed in float32. Out: scalar.
    """
    ignored = logits.shape[1] if ignore_value is None else ignore_value
    count = labelled_pixels(targets, logits.shape[1], ignore_value).sum().clamp_min(1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.long(), ignore_index=ignored, reduction="sum") / count


def partial_dice_loss(
    prob: Tensor, targets: Tensor, ignore_value: int | None = None, *, smooth: float = 1e-5
) -> Tensor:
    """One minus the soft Dice over the labelled pixels of the batch, mean over all classes, background included (FedLPPA).

    Per class: (2 Σ p y v + e) / (Σ p² v + Σ y² v + e), v = 1 at labelled pixels, e = `smooth`. prob (B, C, *) in [0, 1],
    targets (B, *) class ids; ignore_value None: C. No labelled pixel: loss 0 with gradient 0. Departure: the published
    code multiplies (B, H, W) by (B, 1, H, W), which weighs every image by the masks of all; here each has its own. Out:
    scalar.
    """
    ids = torch.arange(prob.shape[1], device=targets.device, dtype=torch.long).view(1, -1, *(1,) * (targets.ndim - 1))
    return soft_dice_loss(
        prob,
        (targets.unsqueeze(1) == ids).to(prob.dtype),
        smooth_numerator=smooth,
        smooth_denominator=smooth,
        squared=True,
        per="batch",
        pixel_mask=labelled_pixels(targets, prob.shape[1], ignore_value),
    )
