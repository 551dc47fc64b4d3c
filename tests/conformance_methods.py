"""Adapters from reference vectors to the methods' functions: {kind: function of one file's arrays}.

An adapter derives every argument from the file, calls the project's function and returns one (key, largest absolute
error, tolerance) per compared output. Equal NaN count as equal; integer counters are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.noise_robust import class_mean_losses, kd_terms, soft_labels
from clients.quality_features import image_features, region_maps, site_features
from fedmed.losses.classification import logit_adjusted_cross_entropy
from strategies.noise_robust import daagg, distance_matrix, identify, kd_weight
from strategies.quality_layerwise import aggregate_layerwise, alpha_by_group, layer_weights, quality_weights

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9
REGION_TOLERANCE = 1e-9


def error(actual: Any, expected: Any) -> float:
    """Largest absolute difference; inf for other shapes or a NaN or infinity in only one of the two."""
    a, b = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def compare(arrays: Arrays, outputs: Mapping[str, Any], tolerance: float = TOLERANCE) -> Compared:
    """Compare `outputs` with the file's `out__` arrays; an output nobody computed is an infinite error."""
    skipped = {f"out__state__{key}" for key in _state_keys(arrays) if arrays[f"in__state__{key}"].dtype.kind in "iub"}
    wanted = [key for key in arrays if key.startswith("out__") and key not in skipped]
    return [(k, error(outputs[k], arrays[k]) if k in outputs else float("inf"), tolerance) for k in wanted]


def _state_keys(arrays: Arrays) -> list[str]:
    return [key.removeprefix("in__state__") for key in arrays if key.startswith("in__state__")]


def _states(arrays: Arrays, count: int) -> list[dict[str, Tensor]]:
    """States of the sites from the stacked `in__state__` arrays."""
    keys = _state_keys(arrays)
    return [{key: torch.from_numpy(np.array(arrays[f"in__state__{key}"][k])) for key in keys} for k in range(count)]


def _tensor(arrays: Arrays, key: str) -> Tensor:
    return torch.from_numpy(np.array(arrays[key]))


def _state_outputs(state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    return {f"out__state__{key}": value.numpy() for key, value in (state or {}).items()}


def noisy_clients(arrays: Arrays) -> Compared:
    """FedNoRo: class means at each site, then the identification."""
    loss, label = _tensor(arrays, "in__sample_loss"), _tensor(arrays, "in__sample_label")
    client, classes = _tensor(arrays, "in__sample_client"), int(arrays["in__num_classes"])
    sites = range(int(arrays["in__num_clients"]))
    raw = np.stack([class_mean_losses(loss[client == k], label[client == k], classes) for k in sites])
    found = identify(raw, num_votes=len(arrays["out__votes"]))
    outputs = {"class_mean_loss_raw": raw, "class_mean_loss_filled": found.filled, "votes": found.votes}
    outputs |= {"indicator_normalised": found.indicator, "is_noisy": found.is_noisy}
    return compare(arrays, {f"out__{key}": value for key, value in outputs.items()})


def noisy_clients_robust(arrays: Arrays) -> Compared:
    """FedNoRo: the identification alone, rule R1."""
    return compare(arrays, {"out__is_noisy": identify(arrays["in__class_mean_loss_raw"]).is_noisy})


def distance_aware(arrays: Arrays) -> Compared:
    """FedNoRo: DaAgg, with and without non-finite states."""
    states = _states(arrays, len(arrays["in__num_examples"]))
    mean, used = daagg(states, arrays["in__num_examples"].tolist(), arrays["in__is_noisy"].tolist())
    outputs = {
        "out__distance": used.distance,
        "out__distance_normalised": used.normalised,
        "out__weights": used.weights,
    }
    if "out__distance_matrix" in arrays:
        outputs["out__distance_matrix"] = distance_matrix(states, states)
    return compare(arrays, {**outputs, **_state_outputs(mean)})


def logit_adjust(arrays: Arrays) -> Compared:
    """FedNoRo: logit-adjusted cross-entropy and its gradient."""
    logits = _tensor(arrays, "in__logits").requires_grad_()
    counts, tau = _tensor(arrays, "in__class_counts"), float(arrays["in__tau"])
    loss = logit_adjusted_cross_entropy(logits, _tensor(arrays, "in__labels"), counts, tau)
    (gradient,) = torch.autograd.grad(loss, logits)
    return compare(arrays, {"out__loss": loss.item(), "out__grad_logits": gradient.numpy()})


def kd_loss(arrays: Arrays) -> Compared:
    """FedNoRo: loss of a noisy site and its gradient."""
    student = _tensor(arrays, "in__student_logits").requires_grad_()
    teacher, temperature = _tensor(arrays, "in__teacher_logits"), float(arrays["in__temperature"])
    labels, counts = _tensor(arrays, "in__labels"), _tensor(arrays, "in__class_counts")
    terms = kd_terms(student, teacher, labels, counts, float(arrays["in__kd_weight"]), temperature, tau=1.0)
    loss = torch.stack(list(terms.values())).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    outputs = {"out__soft_label": soft_labels(teacher, temperature).numpy(), "out__loss": loss.item()}
    return compare(arrays, {**outputs, "out__grad_student_logits": gradient.numpy()})


def rampup(arrays: Arrays) -> Compared:
    """FedNoRo: ramp of the distillation weight."""
    begin, end, cap = (float(arrays[f"in__{key}"]) for key in ("begin", "end", "a"))
    return compare(arrays, {"out__kd_weight": [kd_weight(t, begin, end, cap) for t in arrays["in__rounds"].tolist()]})


def layerwise(arrays: Arrays) -> Compared:
    """FedA3I: α by depth, the weights it amounts to, and the two-sum aggregation."""
    order = [str(name) for name in arrays["meta__group_order"]]
    schedule = (float(arrays[f"in__alpha_{key}"]) for key in ("weight", "power", "bias"))
    alpha = alpha_by_group(len(order), *schedule)
    quality, num_examples = arrays["in__quality_weights"], arrays["in__num_examples"]
    states = _states(arrays, len(quality))
    by_entry = {key: float(alpha[order.index(key.split(".")[0])]) for key in _state_keys(arrays)}
    mean = aggregate_layerwise(zip(quality.tolist(), num_examples.tolist(), states, strict=True), by_entry)
    outputs = {"out__alpha_by_group": alpha}
    outputs["out__weight_by_group_and_client"] = layer_weights(quality, num_examples, alpha)
    return compare(arrays, {**outputs, **_state_outputs(mean)})


def quality(arrays: Arrays) -> Compared:
    """FedA3I: quality weights; without `in__num_examples` all sites are alike (it is then not read: all are valid)."""
    features = arrays["in__loss_features"]
    num_examples = arrays.get("in__num_examples", np.ones(len(features)))
    found = quality_weights(features, num_examples, float(arrays["in__inter_group_weight"]))
    return compare(arrays, {"out__is_expand_group": found.group, "out__quality_weights": found.weights})


def region_loss(arrays: Arrays) -> Compared:
    """FedA3I: region map and the losses over it."""
    logits, masks = _tensor(arrays, "in__logits"), _tensor(arrays, "in__masks")
    regions = region_maps(masks.numpy())
    per_image = image_features(logits, masks, regions)
    outputs = {"out__region": regions, "out__loss_features_per_image": per_image}
    return compare(arrays, {**outputs, "out__loss_features_client": site_features(per_image)}, REGION_TOLERANCE)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fednoro__noisy_clients": noisy_clients,
    "fednoro__noisy_clients_robust": noisy_clients_robust,
    "fednoro__daagg": distance_aware,
    "fednoro__daagg_robust": distance_aware,
    "fednoro__logit_adjust": logit_adjust,
    "fednoro__kd_loss": kd_loss,
    "fednoro__rampup": rampup,
    "feda3i__aggregate": layerwise,
    "feda3i__quality_weights": quality,
    "feda3i__quality_weights_robust": quality,
    "feda3i__region_loss": region_loss,
}
