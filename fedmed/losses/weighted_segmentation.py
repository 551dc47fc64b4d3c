"""Segmentation losses per image that make up for rare classes: the supervision of PASSION (arXiv 2407.14796).

B batch, K classes with the background, * spatial axes (any number), N pixels of an image. Inputs are probabilities, so
that coarser outputs can be enlarged after the softmax. Everything keeps its dtype and is differentiable in `prob`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.losses.segmentation import foreground_channels, soft_dice

PROB_FLOOR = 0.005  # smallest probability whose logarithm is taken (official code)
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by number of spatial axes


def class_masks(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class ids (B, *) of 0 ... K - 1 as 0/1 masks (B, K, *); a pixel with any other id is in no mask."""
    return foreground_channels(labels + 1, num_classes, dtype)


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate maps (B, K, *) linearly, corners aligned, to the spatial `size`; of that size already: the maps."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode=_INTERPOLATION[len(size)], align_corners=True)


def weighted_cross_entropy(prob: Tensor, truth: Tensor, clamp_min: float = PROB_FLOOR) -> Tensor:
    """Cross-entropy with class weights w_k = 1 - N_k / N of the image itself, mean over its pixels.

    prob (B, K, *) in [0, 1], clamped to [clamp_min, 1]; truth (B, K, *) 0/1. -(1/N) Σ_i Σ_k w_k g_ki ln q_ki, >= 0. An
    image of one class only has weight 0 for it: loss and gradient 0. A clamped entry has gradient 0. Out: (B,).
    """
    log_prob = prob.clamp(clamp_min, 1.0).log().flatten(2)
    masks = truth.to(prob.dtype).flatten(2)
    weight = 1.0 - masks.mean(dim=2)
    return -(weight.unsqueeze(2) * masks * log_prob).sum(dim=1).mean(dim=1)


def dice_by_image(prob: Tensor, truth: Tensor) -> Tensor:
    """1 - mean_k 2 Σ q g / (Σ q + Σ g + 1e-7) of each image, background included; a class that the image lacks costs 1.

    prob (B, K, *) in [0, 1], truth (B, K, *) 0/1. Out: (B,), in [0, 1].
    """
    return 1.0 - soft_dice(prob, truth, smooth_numerator=0.0, smooth_denominator=1e-7).mean(dim=1)


def weighted_ce_dice(prob: Tensor, truth: Tensor) -> Tensor:
    """`weighted_cross_entropy` + `dice_by_image`. In: (B, K, *) twice. Out: (B,)."""
    return weighted_cross_entropy(prob, truth) + dice_by_image(prob, truth)


def deep_ce_dice(deep_logits: Sequence[Tensor], truth: Tensor) -> Tensor:
    """Deep supervision Σ_s 2^-s (weighted CE + Dice) of the side outputs s = 1, 2, ..., finest first.

    deep_logits: (B, K, *) of any sizes; softmax first, then enlarged to the size of truth (B, K, *). Out: (B,); zeros
    without side outputs.
    """
    total = truth.new_zeros(truth.shape[0])
    for s, logits in enumerate(deep_logits, start=1):
        total = total + 2.0**-s * weighted_ce_dice(enlarge(logits.softmax(dim=1), truth.shape[2:]), truth)
    return total
