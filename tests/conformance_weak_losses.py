"""Adapters of the losses for weak annotation: partial cross-entropy, partial Dice, gated CRF.

Entries named `_official` describe the published code where it differs (pairs outside the image, masks shared by the
batch, NaN); they are compared only where both must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor

from fedmed.losses.gated_crf import Kernel, binary_mask, gated_crf, pair_denominator
from fedmed.losses.partial import labelled_pixels, partial_cross_entropy, partial_dice_loss

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9
PUBLISHED_TOLERANCE = 1e-6  # its pixel coordinates are float32


def _tensor(arrays: Arrays, key: str) -> Tensor:
    return torch.from_numpy(np.array(arrays[key]))


def _compare(arrays: Arrays, outputs: Mapping[str, Any], tolerance: float = TOLERANCE) -> Compared:
    return [(key, error(value, arrays[key]), tolerance) for key, value in outputs.items()]


def _graded(leaf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, Any]:
    """Loss and its gradient with respect to `leaf`."""
    value = loss(leaf.requires_grad_())
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.numpy()


def _sigma(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def gated(arrays: Arrays) -> Compared:
    """Gated CRF over the pairs inside the image; its gradient is the published one too."""
    columns = (arrays[f"kernel_{name}"].astype(float).tolist() for name in ("weight", "sigma_xy", "sigma_rgb"))
    kernels = [Kernel(weight, _sigma(xy), _sigma(rgb)) for weight, xy, rgb in zip(*columns, strict=True)]
    prob, image, radius = _tensor(arrays, "prob"), _tensor(arrays, "image"), int(arrays["radius"])
    masks = [_tensor(arrays, key) if key in arrays else None for key in ("mask_src", "mask_dst")]
    loss, gradient = _graded(prob, lambda p: gated_crf(p, image, kernels, radius, *masks))
    gates = [None if mask is None else binary_mask(mask, prob) for mask in masks]
    outputs = {
        "denominator": float(pair_denominator(prob[:, 0].numel(), *gates)),
        "loss_in_image_pairs": loss,
        "grad_prob_in_image_pairs": gradient,
    }
    return _compare(arrays, outputs) + _compare(arrays, {"grad_prob_official": gradient}, PUBLISHED_TOLERANCE)


def partial_ce(arrays: Arrays) -> Compared:
    """Partial cross-entropy; without a labelled pixel the published one is NaN."""
    logits, targets, ignore = _tensor(arrays, "logits"), _tensor(arrays, "label"), int(arrays["ignore_index"])
    loss, gradient = _graded(logits, lambda z: partial_cross_entropy(z, targets, ignore))
    labelled = int(labelled_pixels(targets, logits.shape[1], ignore).sum())
    outputs = {"num_labelled": labelled, "loss_safe": loss, "grad_logits_safe": gradient}
    return _compare(arrays, outputs | ({"loss_official": loss} if labelled else {}))


def partial_dice(arrays: Arrays) -> Compared:
    """Partial Dice, every image with its own mask; a batch of one is the published value too."""
    prob, targets, ignore = _tensor(arrays, "prob"), _tensor(arrays, "label"), int(arrays["ignore_index"])
    smooth = float(arrays["smooth"])
    loss, gradient = _graded(prob, lambda p: partial_dice_loss(p, targets, ignore, smooth=smooth))
    outputs = {"loss_pixel_masked": loss, "grad_prob_pixel_masked": gradient}
    same = {"loss_official": loss, "grad_prob_official": gradient} if len(targets) == 1 else {}
    return _compare(arrays, outputs | same)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "weak_losses__gated_crf": gated,
    "weak_losses__partial_ce": partial_ce,
    "weak_losses__partial_dice": partial_dice,
}
