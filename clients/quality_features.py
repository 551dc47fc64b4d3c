"""FedA3I, local half: plain segmentation training, and once the noise features of the site.

Source: Wu et al., AAAI 2024, arXiv 2312.12838, and its official code; see `strategies/quality_layerwise.py` for the
server. Symbols: Y → mask, d_in, d_out → distances to the nearest background and foreground pixel, R_in, R_out → inner
and outer region, f_k → features. B images, F foreground classes, H W pixels.

Departures: an image whose mask of a class is empty or covers everything is undefined for that class and skipped (the
official code raises for the latter). With softmax outputs a class is scored by its one-against-rest logit (our choice;
for two classes this is the sigmoid model's logit), so that masks of several classes can be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.federation.messages import Leaf
from fedmed.losses.segmentation import bce_with_logits, foreground_channels, soft_dice_loss
from fedmed.models.output import Output

NONE, INNER, OUTER = 0, 1, 2


@dataclass(frozen=True)
class QualityFeaturesParams:
    """Constants of the local half; defaults are the official code's."""

    loss: str = "bce"  # bce, or bce_dice: w·BCE + (1 − w)·soft Dice loss
    bce_weight: float = 0.5  # w in [0, 1], read by bce_dice only

    def __post_init__(self) -> None:
        if self.loss not in ("bce", "bce_dice") or not 0 <= self.bce_weight <= 1:
            raise ValueError(f"loss bce or bce_dice and 0 <= bce_weight <= 1 expected, got {self}")


def region_map(mask: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Inner and outer region of one object mask. In: (H, W), 0/1. Out: (H, W), 0 none, 1 inner, 2 outer.

    r = min(largest inside depth, largest outside distance); R_in = {Y = 1, d_in ≤ r}, R_out = {Y = 0, d_out ≤ r},
    Euclidean distances in pixels. A mask that is empty or full has no boundary: 0 everywhere.
    """
    inside = np.asarray(mask) > 0.5
    if not inside.any() or inside.all():
        return np.full(inside.shape, NONE, dtype=np.int64)
    depth, distance = distance_transform_edt(inside), distance_transform_edt(~inside)
    radius = min(depth.max(), distance.max())
    inner, outer = inside & (depth <= radius), ~inside & (distance <= radius)
    return np.where(inner, INNER, np.where(outer, OUTER, NONE)).astype(np.int64)


def region_maps(masks: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """`region_map` of each mask of a batch. (B, F, H, W) → (B, F, H, W)."""
    flat = masks.reshape(-1, *masks.shape[-2:])
    return (
        np.stack([region_map(mask) for mask in flat]).reshape(masks.shape) if len(flat) else np.zeros(masks.shape, int)
    )


def image_features(logits: Tensor, masks: Tensor, regions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean BCE over inner and outer region, by image and class.

    In: logits, masks, regions (B, F, H, W). Out: (B, 2F) float64, columns inner, outer by class; NaN: empty region.
    """
    loss = F.binary_cross_entropy_with_logits(logits.double(), masks.double(), reduction="none").cpu().numpy()
    columns = []
    for channel in range(loss.shape[1]):
        for label in (INNER, OUTER):
            inside = regions[:, channel] == label
            count = inside.sum(axis=(1, 2))
            total = np.where(inside, loss[:, channel], 0.0).sum(axis=(1, 2))
            columns.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return np.stack(columns, axis=1)


def site_features(per_image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Features of the site: mean over the images that define them. (N, 2F) → (2F,), NaN where no image does."""
    known = ~np.isnan(per_image)
    count = known.sum(axis=0)
    total = np.where(known, per_image, 0.0).sum(axis=0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def foreground_logits(logits: Tensor, activation: str) -> Tensor:
    """Logits of the foreground classes as independent yes/no decisions. Out: (B, F, H, W).

    sigmoid: as they are. softmax (B, 1 + F, H, W): z_c − logsumexp of the others, so that its sigmoid is softmax(z)_c.
    """
    if activation == "sigmoid":
        return logits
    channels = logits.shape[1]
    others = [torch.cat([logits[:, :c], logits[:, c + 1 :]], dim=1).logsumexp(dim=1) for c in range(1, channels)]
    return logits[:, 1:] - torch.stack(others, dim=1)


class QualityFeatures(Client):
    """BCE (or BCE and Dice) training; measures the noise features of the received model when the server asks."""

    Params = QualityFeaturesParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf(
            "loss_in_*", "1", "once: mean loss near the contour inside the masks of a class, over the training images"
        ),
        Leaf("loss_out_*", "1", "once: the same outside"),
    )
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Measure the features when asked; the model is still the received one."""
        if self.train_set.ignore_value is not None:
            raise UserError("FedA3I needs complete masks, these leave pixels open; set data.annotation=mask")
        self.features: dict[str, float] = self._measure() if config.get("estimate_noise") else {}

    def _measure(self) -> dict[str, float]:
        """Sweep the training images. Out: `loss_in_<c>`, `loss_out_<c>`; undefined ones are left out."""
        rows = []
        for batch, output in self.sweep("train"):
            logits = foreground_logits(output.logits.float(), self.activation)
            masks = foreground_channels(batch.targets, logits.shape[1], logits.dtype)
            rows.append(image_features(logits, masks, region_maps(masks.cpu().numpy())))
        means = site_features(np.concatenate(rows)) if rows else np.zeros(0)
        names = [f"loss_{side}_{c}" for c in range(len(means) // 2) for side in ("in", "out")]
        return {name: float(value) for name, value in zip(names, means, strict=True) if np.isfinite(value)}

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """BCE over the foreground channels, or its weighted sum with the soft Dice loss (smoothing 1)."""
        logits = foreground_logits(output.logits, self.activation)
        masks = foreground_channels(batch.targets, logits.shape[1], logits.dtype)
        bce = bce_with_logits(logits, masks)
        if self.params.loss == "bce":
            return {"bce": bce}
        dice = soft_dice_loss(logits.sigmoid(), masks, smooth_denominator=1.0 + 1e-8)
        return {"bce": self.params.bce_weight * bce, "dice": (1.0 - self.params.bce_weight) * dice}

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send the features with the update of the round they were asked for."""
        return {}, dict(self.features)
