"""FedIA, local half: Dice training, one measurement of how complete the masks are, and one correction of them.

Source: "FedIA: Federated Medical Image Segmentation with Heterogeneous Annotation Completeness", MICCAI 2024, arXiv
2407.02280, and its official code; see `strategies/completeness.py` for the server.
Symbols: y → labels (0/1), p → prob (background, lesion), y' = 1 where y = 0, argmax p = 1 and p₁ > threshold; a_k =
components of y over components of argmax p. Incomplete means that whole lesions are missing, so pixels are only added.

Departures: both are read from one pass of the received model in eval mode over the unaugmented images (official: from
the model while it trains, whose norm layers see the batch alone and whose weights move from batch to batch).
Components are counted image by image (official: over the batch as one volume, which joins lesions of unrelated images)
and pooled over the site; without any predicted one a_k is 1 (official: error).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import label
from torch import Tensor

from clients.supervised import Supervised
from fedmed.data.split import Batch, Split, fingerprint
from fedmed.errors import UserError
from fedmed.federation.messages import Leaf
from fedmed.losses.segmentation import dice
from fedmed.models.output import Output

log = logging.getLogger("fedmed.site")

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ADDED, SOURCE = "completion/added_mask", "completion/source"  # keys of the personal state


@dataclass(frozen=True)
class AnnotationCompletionParams:
    """Constants of the local half."""

    loss: str = "dice"  # the only choice: the server turns the Dice loss into an IoU
    skip_empty: bool = False  # leave images without lesion out of the loss (our option; official: they count 1)
    mode: str = "pooled2d"  # count components pooled2d: by image (our choice) | batch3d: over a batch (official)

    def __post_init__(self) -> None:
        if self.loss != "dice" or self.mode not in ("pooled2d", "batch3d"):
            raise ValueError(f"loss dice and mode pooled2d or batch3d expected, got {self}")


def image_components(masks: npt.NDArray[Any]) -> Ints:
    """Number of connected components of each mask, 4 neighbours. (N, H, W) 0/1 → (N,)."""
    return np.array([label(mask)[1] for mask in masks], dtype=np.int64)


def volume_components(masks: npt.NDArray[Any]) -> int:
    """Number of connected components of a batch taken as one volume, 6 neighbours (official). (B, H, W) 0/1 → count."""
    return int(label(masks)[1]) if masks.size else 0


def pooled_completeness(annotated: Ints, predicted: Ints) -> float:
    """a_k = Σ annotated / Σ predicted over the images, in [0, 1]. In: counts (N,). No predicted component: 1."""
    total = int(predicted.sum())
    return min(float(annotated.sum()) / total, 1.0) if total > 0 else 1.0


def component_ratios(annotated: Ints, predicted: Ints) -> Floats:
    """Ratio of each batch, annotated / predicted. (n_batches,) → (n_batches,); NaN where nothing is predicted."""
    return np.where(predicted > 0, annotated / np.maximum(predicted, 1), np.nan)


def mean_defined(ratios: Floats) -> float:
    """Mean of the ratios that are defined (may exceed 1); 1 without any."""
    known = ratios[~np.isnan(ratios)]
    return float(known.mean()) if known.size else 1.0


def completeness(annotated: Bools, predicted: Bools, mode: str = "pooled2d", batch_size: int = 1) -> float:
    """Completeness a_k of a site, in [0, 1]. In: masks (n, H, W); `batch_size` ≥ 1 is read by batch3d only."""
    if mode == "pooled2d":
        return pooled_completeness(image_components(annotated), image_components(predicted))
    starts = range(0, len(annotated), batch_size)
    counts = [
        np.array([volume_components(masks[i : i + batch_size]) for i in starts], dtype=np.int64)
        for masks in (annotated, predicted)
    ]
    return min(mean_defined(component_ratios(*counts)), 1.0)


def additions(prob: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Pixels to add: y = 0, argmax p = 1 and p₁ > threshold (strictly). (B, 2, H, W), (B, H, W) → (B, H, W) bool."""
    return (labels == 0) & (prob.argmax(dim=1) == 1) & (prob[:, 1] > threshold)


def complete(labels: Tensor, added: Tensor) -> Tensor:
    """Labels y' with the added pixels set to 1; everything else and the type stay. (n, H, W), (n, H, W) bool."""
    return labels.masked_fill(added, 1)


def pack(masks: Bools) -> Tensor:
    """Masks (n, H, W) as bits, (n, ceil(H·W/8)) uint8."""
    n, height, width = masks.shape
    return torch.from_numpy(np.packbits(masks.reshape(n, height * width), axis=1))


def unpack(bits: Tensor, shape: tuple[int, int, int]) -> Bools:
    """Undo `pack`; `shape` is (n, H, W). Raises `ValueError` if the bits are not of this shape."""
    width = -(-shape[1] * shape[2] // 8)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (shape[0], width):
        raise ValueError(f"expected bits of shape {(shape[0], width)}, got {tuple(bits.shape)}")
    return np.unpackbits(bits.numpy(), axis=1, count=shape[1] * shape[2]).reshape(shape).astype(bool)


class AnnotationCompletion(Supervised):
    """Dice training on the site's masks plus what was added to them; the site file is never changed.

    Keeps the added pixels (1 bit a pixel of the training images) in the personal state, and sends only their number.
    """

    Params: ClassVar[type] = AnnotationCompletionParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("completeness", "1", "once: annotated lesions over predicted ones, over the training images"),
        Leaf("n_corrected_pixels", "1", "number of pixels added to the training masks so far"),
    )
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Measure and correct when asked, the model is still the received one; train on the completed masks."""
        super().begin_round(config, extras)
        self._check_model()
        given = self.train_set
        added = self._kept(given)
        self.completeness: float | None = None
        if config.get("measure") or config.get("correct"):
            predicted, found = self._predict(given, float(config.get("threshold", 0.8)))
            if config.get("measure"):
                annotated = given.targets.cpu().numpy() != 0
                size = self.config.training.batch_size
                self.completeness = completeness(annotated, predicted, self.params.mode, size)
            if config.get("correct"):
                added = found if added is None else added | found
        self.num_added = 0
        if added is not None:
            self.num_added = int(added.sum())
            self.personal = {**self.personal, ADDED: pack(added)}
            self.train_set = given.with_targets(complete(given.targets, torch.from_numpy(added).to(given.device)))

    def _check_model(self) -> None:
        """Refuse what is not a softmax over background and one class. Raises `UserError`."""
        if len(self.data.classes) != 2:
            raise UserError(
                f"FedIA completes masks of one class, this site has {', '.join(self.data.classes[1:])}; "
                "use a site file with one foreground class"
            )
        if self.activation != "softmax":
            raise UserError(f"FedIA reads softmax outputs, not {self.activation}; set model.activation=softmax")

    def _kept(self, given: Split) -> Bools | None:
        """Pixels added in earlier rounds, (n, H, W), or None; none either when the masks of the site are others now."""
        source, kept = fingerprint(given), self.personal.get(ADDED)
        known = self.personal.get(SOURCE, source)
        # Kept from the first round on, before there is any mask: then a site that lost its folder says so.
        self.personal = {**self.personal, SOURCE: source}
        if kept is None:
            return None
        n, (height, width) = len(given), self.data.image_size
        try:
            if not torch.equal(known, source):
                raise ValueError("other training items or masks than in the rounds before")
            return unpack(kept, (n, height, width))
        except ValueError as error:
            log.warning("site %s, round %d: the added pixels are dropped: %s", self.site, self.round, error)
            self.personal = {name: value for name, value in self.personal.items() if name != ADDED}
            return None

    def _predict(self, given: Split, threshold: float) -> tuple[Bools, Bools]:
        """Sweep the training images. Out: argmax p = 1 and the pixels to add, each (n, H, W)."""
        predicted, found = [], []
        for batch, output in self.sweep(given):
            prob = output.logits.softmax(dim=1)
            predicted.append((prob.argmax(dim=1) == 1).cpu().numpy())
            found.append(additions(prob, batch.targets, threshold).cpu().numpy())
        return np.concatenate(predicted), np.concatenate(found)

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """Soft Dice loss of the lesion class, per image and then the mean."""
        return {"dice": dice(output.logits, batch.targets, skip_empty=self.params.skip_empty)}

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send the completeness in the round it was asked for, and the number of added pixels."""
        measured = {} if self.completeness is None else {"completeness": self.completeness}
        return {}, {"n_corrected_pixels": self.num_added, **measured}
