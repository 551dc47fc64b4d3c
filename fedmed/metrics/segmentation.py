"""Dice and 95 % Hausdorff distance per case and class.

N cases, H W pixels, C classes with background 0, F = C - 1 foreground classes. NaN = undefined, never 0: Dice where
neither prediction nor reference holds the class, the distance where either is empty.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

THRESHOLD = 0.5


def label_map(prob: Tensor, activation: str) -> Tensor:
    """Class ids (B, H, W) int64 of per-pixel probabilities; NaN counts as background.

    softmax: prob (B, C, H, W), the largest. sigmoid: prob (B, F, H, W) of the foreground classes: the largest where it
    exceeds 0.5, background elsewhere.
    """
    if activation == "softmax":
        return prob.argmax(dim=1) * prob.isfinite().all(dim=1)
    if prob.shape[1] == 1:
        return (prob[:, 0] > THRESHOLD).long()
    value, place = prob.max(dim=1)
    return torch.where(value > THRESHOLD, place + 1, 0)


def _areas(predicted: Tensor, reference: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of every foreground class in the overlap, the prediction and the reference: three (N, F) int64."""
    flat_predicted, flat_reference = predicted.flatten(1), reference.flatten(1)
    columns = []
    for label in range(1, num_classes):
        is_predicted, is_reference = flat_predicted == label, flat_reference == label
        columns.append(torch.stack([(is_predicted & is_reference).sum(1), is_predicted.sum(1), is_reference.sum(1)]))
    both, first, second = torch.stack(columns, dim=-1).unbind(0)
    return both, first, second


def dice_scores(predicted: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Dice 2|P∩R| / (|P| + |R|) per case and foreground class.

    predicted, reference (N, H, W) integer class ids. Out: (N, F) float64 in [0, 1], NaN where both are empty.
    """
    both, first, second = _areas(predicted, reference, num_classes)
    return 2 * both.double() / (first + second).double()  # 0 / 0 is NaN, as it should be


def hausdorff95(predicted: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """The larger of the two directed 95-percentile surface distances, in pixels, per case and foreground class (MONAI's
    definition).

    predicted, reference (N, H, W) integer class ids. Out: (N, F) float64, NaN where either is empty. MONAI crops each
    pair to its bounding box before the distance transform.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance  # imports for seconds

    predicted, reference = predicted.cpu(), reference.cpu()  # the distance transform runs there anyway
    ids = torch.arange(1, num_classes).view(1, -1, 1, 1)
    predicted_mask, reference_mask = predicted.unsqueeze(1) == ids, reference.unsqueeze(1) == ids
    defined = predicted_mask.flatten(2).any(2) & reference_mask.flatten(2).any(2)
    distance = torch.full(defined.shape, torch.nan, dtype=torch.float64)
    if defined.any():  # only defined pairs: MONAI warns about empty masks
        first, second = predicted_mask[defined].unsqueeze(1), reference_mask[defined].unsqueeze(1)
        with warnings.catch_warnings():  # MONAI calls a deprecated argument of its own
            warnings.simplefilter("ignore", FutureWarning)
            pairs = compute_hausdorff_distance(first, second, include_background=True, percentile=95)
        distance[defined] = pairs[:, 0].double()
    return distance


def segmentation_cases(
    predicted: Tensor, reference: Tensor, num_classes: int, hd95: bool = False
) -> list[dict[str, float]]:
    """One record per case: for every foreground class c `dice_c`, `missed_c`, `both_empty_c`, and `hd95_c` when asked
    for.

    predicted, reference (N, H, W) integer class ids, on one device. dice, hd95: means over the classes where they are
    defined. missed_c is 1 when exactly one of prediction and reference is empty (then Dice is 0 and the distance
    undefined), both_empty_c when both are; missed, both_empty: the number of such classes.
    """
    if predicted.shape != reference.shape:
        raise ValueError(
            f"prediction {tuple(predicted.shape)} and reference {tuple(reference.shape)} must have one shape"
        )
    both, first, second = (part.cpu().numpy() for part in _areas(predicted, reference, num_classes))
    total = first + second
    tables = {
        "dice": np.divide(2.0 * both, total, out=np.full(total.shape, np.nan), where=total > 0),
        "missed": ((first > 0) != (second > 0)).astype(np.float64),
        "both_empty": (total == 0).astype(np.float64),
    }
    if hd95:
        tables["hd95"] = hausdorff95(predicted, reference, num_classes).numpy()
    overall = {name: row_mean(t) if name in ("dice", "hd95") else t.sum(axis=1) for name, t in tables.items()}
    records = []
    for case in range(total.shape[0]):
        record = {name: float(values[case]) for name, values in overall.items()}
        for place in range(num_classes - 1):
            record.update({f"{name}_{place + 1}": float(table[case, place]) for name, table in tables.items()})
        records.append(record)
    return records


def row_mean(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each row of (N, F) over its non-NaN entries; NaN for a row without any."""
    known = ~np.isnan(table)
    count = known.sum(axis=1)
    total = np.where(known, table, 0.0).sum(axis=1)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(table), np.nan), where=count > 0)
    return mean


def known_mean(values: NDArray[np.float64]) -> float:
    """Mean of the non-NaN values; NaN when there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
