"""Adapters from reference vectors to FedIA's functions; see `conformance_methods`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error

from clients.annotation_completion import (
    additions,
    complete,
    component_ratios,
    image_components,
    mean_defined,
    pooled_completeness,
    volume_components,
)
from fedmed.losses.segmentation import dice
from strategies.completeness import (
    completeness_weights,
    exponents,
    fit_line,
    gap,
    iou_proxy,
    size_weights,
    triggered,
)

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9
LINE_TOLERANCE = 1e-7


def compared(arrays: Arrays, outputs: Mapping[str, Any]) -> Compared:
    """One line for each output; integers and flags must be equal."""
    lines = []
    for key, value in outputs.items():
        tolerance = 0.0 if arrays[key].dtype.kind in "iub" else TOLERANCE
        lines.append((key, error(value, arrays[key]), LINE_TOLERANCE if key in ("slope", "intercept") else tolerance))
    return lines


def completeness_indicator(arrays: Arrays) -> Compared:
    """Components by batch (as one volume) and by image, and the indicators made of them."""
    predicted, annotated = arrays["predicted_mask"], arrays["annotation_mask"]
    batch = {key: np.array([volume_components(b) for b in m]) for key, m in (("p", predicted), ("y", annotated))}
    image = {key: np.array([image_components(b) for b in m]) for key, m in (("p", predicted), ("y", annotated))}
    ratios = component_ratios(batch["y"], batch["p"])
    outputs = {
        "batch_component_count_pred": batch["p"],
        "batch_component_count_label": batch["y"],
        "batch_ratio": ratios,
        "indicator_released_code": ratios.mean(),  # NaN where a ratio is
        "indicator_skip_undefined": mean_defined(ratios),
        "image_component_count_pred": image["p"],
        "image_component_count_label": image["y"],
        "indicator_pooled_2d": pooled_completeness(image["y"].ravel(), image["p"].ravel()),
    }
    return compared(arrays, outputs)


def aggregation_weights(arrays: Arrays) -> Compared:
    """Exponents, their softmax, and the weights by size."""
    sizes = arrays["sample_counts"].astype(np.float64)
    exponent = exponents(arrays["completeness"], arrays["epoch_loss"])
    weights = completeness_weights(exponent, sizes)
    return compared(arrays, {"exponent": exponent, "weights": weights, "weights_fedavg": size_weights(sizes)})


def label_correction(arrays: Arrays) -> Compared:
    """Completed labels and the number of added pixels."""
    labels = torch.from_numpy(np.array(arrays["labels"]))
    added = additions(torch.from_numpy(np.array(arrays["probabilities"])), labels, float(arrays["threshold"]))
    outputs = {"corrected_labels": complete(labels, added).numpy(), "changed_pixels": int(added.sum())}
    return compared(arrays, outputs)


def correction_trigger(arrays: Arrays) -> Compared:
    """IoU proxy, line of the warm-up, gap, and the rounds of trigger and correction."""
    loss, last, margin = arrays["epoch_loss"], int(arrays["warmup_last_round"]), float(arrays["margin"])
    iou = iou_proxy(loss)
    line = fit_line(iou[: last + 1])
    assert line is not None
    first = next((t for t in range(last + 1, len(loss)) if triggered(line, t, float(loss[t]), margin)), -1)
    outputs = {"iou": iou, "slope": line[0], "intercept": line[1], "gap": gap(line, np.arange(len(loss)), iou)}
    return compared(arrays, {**outputs, "first_trigger_round": first, "correction_round": first + (first >= 0)})


def dice_loss(arrays: Arrays) -> Compared:
    """Loss and its gradient by the foreground probability; the logits are the logarithms, which softmax undoes."""
    prob = torch.from_numpy(np.array(arrays["foreground_probability"])).requires_grad_()
    loss = dice(torch.stack([torch.log1p(-prob), prob.log()], dim=1), torch.from_numpy(arrays["target"]).long())
    (gradient,) = torch.autograd.grad(loss, prob)
    return compared(arrays, {"loss": loss.item(), "grad": gradient.numpy()})


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedia__completeness_indicator": completeness_indicator,
    "fedia__aggregation_weights": aggregation_weights,
    "fedia__label_correction": label_correction,
    "fedia__correction_trigger": correction_trigger,
    "fedia__dice_loss": dice_loss,
}
