"""Adapters from reference vectors to FedMLP's functions; see `conformance_methods`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor

from clients.prototype_tags import (
    learning_degrees,
    local_prototypes,
    most_confident,
    quota,
    sides,
    similarity_difference,
)
from fedmed.losses.classification import binary_cross_entropy
from fedmed.losses.multilabel import joint_terms, masked_squared_error, prior_shift, two_view_terms
from strategies.missing_classes import aggregate_degrees, aggregate_prototypes, row_weights

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9
PRIOR_CLIP = 1e-12  # of the vectors


def compared(arrays: Arrays, outputs: Mapping[str, Any]) -> Compared:
    """One line for each output; integers must be equal."""
    return [(k, error(v, arrays[k]), 0.0 if arrays[k].dtype.kind in "iub" else TOLERANCE) for k, v in outputs.items()]


def tensor(arrays: Arrays, key: str, grad: bool = False) -> Tensor:
    """An array of the file as a float64 leaf."""
    return torch.from_numpy(np.array(arrays[key], dtype=np.float64)).requires_grad_(grad)


def prototypes(arrays: Arrays) -> Compared:
    """Class means of one site and their counts."""
    labels = arrays["labels"] == 1
    annotated = np.zeros(labels.shape, dtype=bool)
    annotated[:, arrays["active_classes"]] = True
    assert labels.shape[1] == int(arrays["n_classes"])
    proto, counts = local_prototypes(arrays["features"], labels, annotated)
    return compared(arrays, {"prototypes": proto, "counts": counts})


def prototype_aggregation(arrays: Arrays) -> Compared:
    """Mean over the active sites; the file knows no counts, so every active site has items of both kinds."""
    tables, active = arrays["client_prototypes"], arrays["active_mask"] != 0
    counts = np.ones(tables.shape[:2])
    weights = row_weights(tables, counts, active, arrays["client_weights"].astype(np.float64))
    start = np.full(tables.shape[1:], np.nan)  # what the released code gives for a class nobody annotates
    found, _ = aggregate_prototypes(tables, weights, start, np.zeros(len(start), dtype=bool))
    return compared(arrays, {"global_prototypes": found})


def learning_degree(arrays: Arrays) -> Compared:
    """Degrees of the sites on their missing classes, and their mean."""
    active = arrays["active_mask"] != 0
    prob = torch.from_numpy(np.array(arrays["logits"])).sigmoid().numpy()
    lower, upper = float(arrays["lower"]), float(arrays["upper"])
    local = np.stack([learning_degrees(p, lower, upper) for p in prob])
    local = np.where(active, 0.0, local)
    mean = aggregate_degrees(local, active, arrays["client_weights"].astype(np.float64), np.ones(active.shape[1]))
    return compared(arrays, {"client_degree": local, "global_degree": mean})


def pseudo_label_tagging(arrays: Arrays) -> Compared:
    """Similarity differences, sides, quotas and the ids in order, ours and the released code's."""
    difference = similarity_difference(arrays["features"], arrays["global_prototypes"])
    missing, ids = arrays["missing_classes"], arrays["sample_ids"].astype(np.int64)
    fractions = float(arrays["negative_fraction"]), float(arrays["positive_fraction"])
    outputs: dict[str, Any] = {"similarity_difference": difference[:, missing].T}
    for c in missing.tolist():
        numbers = [int(side.sum()) for side in sides(difference[:, c])]
        quotas = [quota(r, count) for r, count in zip(fractions, numbers, strict=True)]
        negative, positive = most_confident(difference[:, c], ids, *fractions)
        outputs |= {f"class{c}_side_counts": numbers, f"class{c}_quotas": quotas}
        outputs |= {f"class{c}_negative_ids": negative, f"class{c}_positive_ids": positive}
        outputs[f"class{c}_negative_ids_released_code"] = negative
        outputs[f"class{c}_positive_ids_released_code"] = positive if quotas[0] else positive[:0]
    return compared(arrays, outputs)


def stage1_loss(arrays: Arrays) -> Compared:
    """Both terms, their sum, its gradients, and the values scaled to the nominal batch."""
    views = [tensor(arrays, f"logits_view{v}", grad=True) for v in (1, 2)]
    teachers = [tensor(arrays, f"global_logits_view{v}") for v in (1, 2)]
    active = torch.from_numpy(np.array(arrays["active_mask"])).bool().expand_as(views[0])
    terms = two_view_terms(views, teachers, tensor(arrays, "labels"), active)
    total = terms["supervised"] + terms["consistency"]
    gradients = torch.autograd.grad(total, views)
    scale = len(views[0]) / int(arrays["nominal_batch_size"])
    outputs = {name: value.item() for name, value in terms.items()} | {"total": total.item()}
    outputs |= {f"{name}_nominal_batch": value.item() * scale for name, value in terms.items()}
    return compared(arrays, outputs | {f"grad_logits_view{v + 1}": g.numpy() for v, g in enumerate(gradients)})


def stage2_loss(arrays: Arrays) -> Compared:
    """The joint mean and its gradient, and the two other ways to weigh the parts."""
    logits, teacher, labels = (
        tensor(arrays, "logits", grad=True),
        tensor(arrays, "global_logits"),
        tensor(arrays, "labels"),
    )
    supervised = torch.from_numpy(np.array(arrays["distill_mask"])) == 0
    joint = torch.stack(list(joint_terms(logits, teacher, labels, supervised).values())).sum()
    (gradient,) = torch.autograd.grad(joint, logits)
    bce = binary_cross_entropy(logits, labels, supervised).item()
    outputs = {"joint_mean": joint.item(), "grad_joint_mean": gradient.numpy(), "supervised_only_released_code": bce}
    apart = bce + masked_squared_error(logits, teacher, ~supervised).item()
    return compared(arrays, {**outputs, "separate_means": apart})


def prior_adjusted_probability(arrays: Arrays) -> Compared:
    """Logits with the prior, and what the sigmoid makes of them."""
    adjusted = tensor(arrays, "probability").logit() + prior_shift(tensor(arrays, "class_prior"), PRIOR_CLIP)
    outputs = {"adjusted_logit": adjusted.numpy(), "adjusted_probability": adjusted.sigmoid().numpy()}
    return compared(arrays, outputs)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedmlp__local_prototypes": prototypes,
    "fedmlp__prototype_aggregation": prototype_aggregation,
    "fedmlp__learning_degree": learning_degree,
    "fedmlp__pseudo_label_tagging": pseudo_label_tagging,
    "fedmlp__stage1_loss": stage1_loss,
    "fedmlp__stage2_loss": stage2_loss,
    "fedmlp__prior_adjusted_probability": prior_adjusted_probability,
}
