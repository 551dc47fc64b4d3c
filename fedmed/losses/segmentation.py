"""Soft Dice in all its variants, and the losses of full-mask segmentation.

B batch, C channels (classes), F foreground channels, * spatial axes (any number). Everything differentiable keeps its
dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.classification import binary_cross_entropy


def foreground_channels(targets: Tensor, num_channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn class ids (B, *) (0 background) into 0/1 channels (B, num_channels, *) of the classes 1 ... num_channels."""
    ids = torch.arange(1, num_channels + 1, device=targets.device, dtype=targets.dtype)
    return (targets.unsqueeze(1) == ids.view(1, -1, *(1,) * (targets.ndim - 1))).to(dtype)


def soft_dice(
    prob: Tensor,
    target: Tensor,
    *,
    smooth_numerator: float = 1.0,
    smooth_denominator: float = 1.0,
    squared: bool = False,
    per: Literal["image", "batch"] = "image",
    pool_channels: bool = False,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    """Soft Dice coefficients (2 Σ p y + a) / (Σ p + Σ y + b), a = `smooth_numerator`, b = `smooth_denominator`.

    prob (B, C, *) in [0, 1]; target of the same shape, 0/1 or soft. squared: Σ p² + Σ y² below. per: sums over the
    pixels of one image, or of the whole batch. pool_channels: sums also run over the channels. pixel_mask (B, *), 1 =
    use. Out: (B, C) for "image", (C,) for "batch", without C when pooled. 0 / 0 (possible only with b = 0) counts as 1,
    with gradient 0.

    Variants: FedA3I a=1, b=1+1e-8; FedIA a=0, b=1e-4; FedMix a=b=1e-4, pooled; partial Dice (FedLPPA) a=b=1e-5,
    squared, "batch", mask; PASSION a=0, b=1e-7.
    """
    if prob.shape != target.shape:
        raise ValueError(f"prob and target must have one shape, got {tuple(prob.shape)} and {tuple(target.shape)}")
    if per not in ("image", "batch"):
        raise ValueError(f"per must be 'image' or 'batch', got {per!r}")
    truth = target.to(prob.dtype)
    if pixel_mask is not None:
        mask = pixel_mask.to(prob.dtype).unsqueeze(1)
        prob, truth = prob * mask, truth * mask
    axes = list(range(2, prob.ndim))
    axes += [1] if pool_channels else []
    axes += [0] if per == "batch" else []
    overlap = (prob * truth).sum(dim=axes)
    size = (prob.square() + truth.square()).sum(dim=axes) if squared else (prob + truth).sum(dim=axes)
    below = size + smooth_denominator
    empty = below == 0
    return ((2 * overlap + smooth_numerator) / below.masked_fill(empty, 1.0)).masked_fill(empty, 1.0)


def soft_dice_loss(
    prob: Tensor,
    target: Tensor,
    *,
    smooth_numerator: float = 1.0,
    smooth_denominator: float = 1.0,
    squared: bool = False,
    per: Literal["image", "batch"] = "image",
    pool_channels: bool = False,
    pixel_mask: Tensor | None = None,
) -> Tensor:
    """One minus the mean of `soft_dice` (same arguments) over images and channels. Out: scalar, in [0, 1] up to
    smoothing.
    """
    score = soft_dice(
        prob,
        target,
        smooth_numerator=smooth_numerator,
        smooth_denominator=smooth_denominator,
        squared=squared,
        per=per,
        pool_channels=pool_channels,
        pixel_mask=pixel_mask,
    )
    return 1 - score.mean()


def bce_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy with logits over all entries.

    logits (B, L) with targets (B, L) in [0, 1] (multi-label), or logits (B, F, *) with class ids (B, *), 0 background,
    or with channels (B, F, *) (segmentation with sigmoid outputs). Out: scalar.
    """
    return binary_cross_entropy(logits, _like(logits, targets))


def bce_dice(logits: Tensor, targets: Tensor, bce_weight: float = 0.5) -> Tensor:
    """bce_weight · BCE + (1 - bce_weight) · (1 - soft Dice) of sigmoid outputs: the combined loss of FedA3I (arXiv
    2312.12838).

    logits (B, F, *), targets: class ids (B, *) or channels (B, F, *). Dice per image and channel, smoothing 1 in
    numerator and denominator, 1e-8 more in the denominator, then the mean. Out: scalar.
    """
    truth = _like(logits, targets)
    dice = soft_dice_loss(logits.sigmoid(), truth, smooth_denominator=1.0 + 1e-8)
    return bce_weight * binary_cross_entropy(logits, truth) + (1 - bce_weight) * dice


def ce_dice(logits: Tensor, targets: Tensor, ce_weight: float = 0.5) -> Tensor:
    """ce_weight · cross-entropy + (1 - ce_weight) · (1 - soft Dice of the foreground) of softmax outputs.

    logits (B, C, *), C >= 2, targets (B, *) int64 class ids, 0 background. Dice as in `bce_dice`, background left out,
    so that the two differ in the activation only (our choice). Out: scalar.
    """
    truth = foreground_channels(targets, logits.shape[1] - 1, logits.dtype)
    dice = soft_dice_loss(logits.softmax(dim=1)[:, 1:], truth, smooth_denominator=1.0 + 1e-8)
    return ce_weight * F.cross_entropy(logits, targets) + (1 - ce_weight) * dice


def dice(logits: Tensor, targets: Tensor, *, skip_empty: bool = False) -> Tensor:
    """1 - mean soft Dice of the foreground of softmax outputs, per image and class: the loss of FedIA (arXiv 2407.02280).

    logits (B, C, *), C >= 2, targets (B, *) int64 class ids, 0 background. (2 Σ p y) / (Σ p + Σ y + 1e-4). A class that an
    image lacks has loss 1 and gradient 0, as published; with `skip_empty` it is left out of the mean (nothing left: loss 0
    with gradient 0). Out: scalar.
    """
    truth = foreground_channels(targets, logits.shape[1] - 1, logits.dtype)
    score = soft_dice(logits.softmax(dim=1)[:, 1:], truth, smooth_numerator=0.0, smooth_denominator=1e-4)
    if not skip_empty:
        return 1 - score.mean()
    drawn = truth.flatten(2).any(dim=2).to(score.dtype)
    return ((1 - score) * drawn).sum() / drawn.sum().clamp_min(1.0)


def _like(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets as channels of the shape of the logits: class ids are expanded, channels only change their dtype."""
    if targets.ndim == logits.ndim - 1:
        return foreground_channels(targets, logits.shape[1], logits.dtype)
    return targets.to(logits.dtype)
