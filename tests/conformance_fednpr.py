"""Adapters from reference vectors to FedNPR's functions; see `conformance_methods`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor

from fedmed.losses.classification import log_prior, logit_adjusted_cross_entropy
from fedmed.losses.prototypes import (
    class_scores,
    hard_assignment,
    normalised_logits,
    npr_loss,
    similarities,
    sinkhorn_plan,
    update_prototypes,
)

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9
EPS = 1e-9  # of the class shares


def compared(arrays: Arrays, outputs: Mapping[str, Any]) -> Compared:
    """One line for each output; integers must be equal."""
    return [
        (key, error(value, arrays[key]), 0.0 if arrays[key].dtype.kind in "iub" else TOLERANCE)
        for key, value in outputs.items()
    ]


def tensor(arrays: Arrays, key: str) -> Tensor:
    """An array of the file as a tensor of its own."""
    return torch.from_numpy(np.array(arrays[key]))


def regulariser(arrays: Arrays) -> Compared:
    """Similarities, logits, loss and its gradient, and the sum with a base loss, as meant and as the official code adds it."""
    features, prototypes = tensor(arrays, "features").requires_grad_(), tensor(arrays, "prototypes")
    similarity = similarities(features.detach(), prototypes)
    scores = class_scores(similarity)
    loss = npr_loss(features, prototypes, tensor(arrays, "labels"))
    (gradient,) = torch.autograd.grad(loss, features)
    lam, base = float(arrays["lam"]), float(arrays["example_ce"])
    outputs = {
        "similarity": similarity,
        "max_similarity": scores,
        "normalised_logits": normalised_logits(scores),
        "npr_loss": loss.item(),
        "grad_features": gradient,
        "total_weighted": base + lam * loss.item(),
        "total_released_code": base + lam + loss.item(),
    }
    return compared(arrays, outputs)


def balanced_softmax_loss(arrays: Arrays) -> Compared:
    """Cross-entropy with the prior, and its gradient."""
    logits, counts = tensor(arrays, "logits").requires_grad_(), tensor(arrays, "class_counts")
    loss = logit_adjusted_cross_entropy(logits, tensor(arrays, "labels"), counts, eps=EPS)
    (gradient,) = torch.autograd.grad(loss, logits)
    outputs = {"prior": log_prior(counts).exp(), "loss": loss.item(), "grad_logits": gradient}
    return compared(arrays, outputs)


def cluster_assignment_and_update(arrays: Arrays) -> Compared:
    """Plan, assignment and new prototypes, those without item kept or (starting from zeros) zero."""
    features, previous = tensor(arrays, "features"), tensor(arrays, "previous_prototypes")
    epsilon, iterations = float(arrays["sinkhorn_epsilon"]), int(arrays["sinkhorn_iterations"])
    plan = sinkhorn_plan(tensor(arrays, "similarity"), epsilon, iterations)
    assignment = hard_assignment(plan)
    outputs = {
        "sinkhorn_plan": plan,
        "sinkhorn_assignment": assignment,
        "cluster_counts": torch.bincount(assignment, minlength=len(previous)),
        "updated_prototypes": update_prototypes(features, assignment, previous)[0],
        "updated_prototypes_zero_if_empty": update_prototypes(features, assignment, torch.zeros_like(previous))[0],
    }
    return compared(arrays, outputs)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fednpr__regulariser": regulariser,
    "fednpr__balanced_softmax_loss": balanced_softmax_loss,
    "fednpr__cluster_assignment_and_update": cluster_assignment_and_update,
}
