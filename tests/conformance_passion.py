"""Adapters from reference vectors to PASSION's functions; see `conformance_methods`.

Outputs named `_released` are left out: there one image with a single modality makes every weight NaN, which the project
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor

from fedmed.federation.schedule import polynomial
from fedmed.losses import balance, distillation
from fedmed.losses.segmentation import soft_dice_loss
from fedmed.losses.weighted_segmentation import class_masks, dice_by_image, weighted_cross_entropy

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9


def tensor(arrays: Arrays, key: str) -> Tensor:
    return torch.from_numpy(np.array(arrays[key]))


def compared(arrays: Arrays, outputs: Mapping[str, Any]) -> Compared:
    """One line for each output; integers must be equal."""
    tolerance = {key: 0.0 if arrays[key].dtype.kind in "iub" else TOLERANCE for key in outputs}
    values = {key: v.detach().numpy() if isinstance(v, Tensor) else v for key, v in outputs.items()}
    return [(key, error(value, arrays[key]), tolerance[key]) for key, value in values.items()]


def pixel_distillation(arrays: Arrays) -> Compared:
    """Divergence by image, its mean, the student's gradient, and the divergence without a clamp."""
    student, temperature = tensor(arrays, "student_logits").requires_grad_(), float(arrays["temperature"])
    clamp_min = float(arrays["clamp_min"])
    prob = [distillation.tempered(z, temperature) for z in (student, tensor(arrays, "teacher_logits"))]
    by_image = distillation.pixel_divergence(*prob, temperature, clamp_min)
    unclamped = distillation.pixel_divergence(*prob, temperature, 0.0).mean()
    (gradient,) = torch.autograd.grad(by_image.mean(), student, retain_graph=True)
    outputs = {"loss": by_image.mean(), "loss_per_sample": by_image, "grad_student": gradient}
    return compared(arrays, {**outputs, "loss_without_clamp": unclamped})


def semantic_distillation(arrays: Arrays) -> Compared:
    """Loss and distance with the classes of the batch and with those of each image; gradient of the former loss."""
    student = tensor(arrays, "student_features").requires_grad_()
    truth = class_masks(tensor(arrays, "labels"), int(arrays["n_classes"]), torch.float64)
    maps = [distillation.similarity_maps(z, truth) for z in (student, tensor(arrays, "teacher_features"))]
    common, own = distillation.common_classes(truth), distillation.own_classes(truth)
    loss, distance = distillation.semantic_loss(*maps, common), distillation.semantic_distance(*maps, common)
    (gradient,) = torch.autograd.grad(loss.mean(), student, retain_graph=True)
    outputs = {
        "loss": loss.mean(),
        "distance": distance.mean(),
        "loss_per_sample": loss,
        "distance_per_sample": distance,
        "grad_student": gradient,
        "loss_per_sample_own_classes": distillation.semantic_loss(*maps, own),
        "distance_per_sample_own_classes": distillation.semantic_distance(*maps, own),
    }
    return compared(arrays, outputs)


def segmentation_losses(arrays: Arrays) -> Compared:
    """Dice by batch and by image, weighted cross-entropy by image and its mean."""
    prob = tensor(arrays, "probabilities")
    truth = class_masks(tensor(arrays, "labels"), int(arrays["n_classes"]), torch.float64)
    weighted = weighted_cross_entropy(prob, truth)
    outputs = {
        "dice": soft_dice_loss(prob, truth, smooth_numerator=0.0, smooth_denominator=1e-7, per="batch"),
        "dice_per_sample": dice_by_image(prob, truth),
        "weighted_ce": weighted.mean(),
        "weighted_ce_per_sample": weighted,
    }
    return compared(arrays, outputs)


def iteration_reweighting(arrays: Arrays) -> Compared:
    """Frequency weights, lag, gate, and the weighted terms of one step."""
    present, distance = tensor(arrays, "modality_mask"), tensor(arrays, "distance")
    frequency = balance.frequency_weights(int(arrays["iterations_per_epoch"]), tensor(arrays, "modality_counts"))
    lag = balance.task_lag(distance, present)
    gate = balance.task_gate(lag)
    losses = (tensor(arrays, f"{key}_loss") for key in ("sep", "pixel", "proto"))
    terms = balance.balanced_terms(*losses, present, gate, tensor(arrays, "beta"), frequency)
    total = float(arrays["fuse_loss"]) + float(arrays["prm_loss"]) + terms["single"]
    outputs = {"neg_relative_preference_sum": lag, "gate": gate, "sep": terms["single"], "kl": terms["pixel"]}
    outputs |= {"proto": terms["semantic"], "total": total + 0.5 * terms["pixel"] + 0.1 * terms["semantic"]}
    robust = {f"{key}_robust": value for key, value in outputs.items()}
    return compared(arrays, {"modality_weight": frequency, **robust})


def epoch_beta_update(arrays: Arrays) -> Compared:
    """Preference, η and β update by update."""
    distances, (low, high) = tensor(arrays, "epoch_distance"), arrays["clamp"].tolist()
    eta, beta = float(arrays["eta0"]), torch.ones(distances.shape[1], dtype=torch.float64)
    params = balance.BalanceParams(eta, float(arrays["eta_factor"]), int(arrays["eta_period"]), low, high)
    etas, betas = [], []
    for e, distance in enumerate(distances):
        beta, eta = balance.update_balance(beta, eta, e, distance, params)
        etas.append(eta)
        betas.append(beta)
    preference = torch.stack([balance.round_preference(distance) for distance in distances])
    return compared(arrays, {"relative_preference": preference, "eta": np.array(etas), "beta": torch.stack(betas)})


def poly_lr(arrays: Arrays) -> Compared:
    """Learning rates; the file counts epochs from 0, the project rounds from 1."""
    lr, last = float(arrays["base_lr"]), int(arrays["num_epochs"])
    return compared(arrays, {"lr": [polynomial(lr, e + 1, last, 0.9) for e in arrays["epochs"].tolist()]})


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "passion__pixel_distillation": pixel_distillation,
    "passion__semantic_distillation": semantic_distillation,
    "passion__segmentation_losses": segmentation_losses,
    "passion__iteration_reweighting": iteration_reweighting,
    "passion__epoch_beta_update": epoch_beta_update,
    "passion__poly_lr": poly_lr,
}
