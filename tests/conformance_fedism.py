"""Adapters from reference vectors to FedISM and FedISM+; see `conformance_methods.py`. Arrays (K,) are the sites in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from conformance_methods import Arrays, Compared, _state_outputs, _states, _tensor, compare
from torch import Tensor, nn

from clients.sharpness_aware import gsam_step, sharpness_losses
from fedmed.config import from_tree
from fedmed.losses.classification import logit_adjusted_cross_entropy
from strategies.sharpness_matching import (
    FedISM,
    FedISMParams,
    FedISMPlus,
    FedISMPlusParams,
    aggregate,
    sharpness,
    sharpness_weights,
)

MINI_BATCH = 50  # the gradient is a sum over batches; the result must not depend on their size


def weights(arrays: Arrays) -> Compared:
    """Sharpness and weights of one round, with and without history and non-finite losses."""
    found = sharpness(arrays["in__loss"], arrays["in__perturbed_loss"])
    previous = arrays["in__previous_weights"] if bool(arrays["in__has_previous"]) else None
    omega = sharpness_weights(found, float(arrays["in__q"]), float(arrays["in__beta"]), previous)
    return compare(arrays, {"out__sharpness": found, "out__weights": omega})


def linear(arrays: Arrays) -> nn.Linear:
    """Linear model with the weights of the file, in their dtype."""
    weight, bias = _tensor(arrays, "in__weight"), _tensor(arrays, "in__bias")
    model = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    model.load_state_dict({"weight": weight, "bias": bias})
    return model


def perturb(arrays: Arrays) -> Compared:
    """Perturbed model and both losses."""
    model, x, y = linear(arrays), _tensor(arrays, "in__x"), _tensor(arrays, "in__y")
    outputs: dict[str, Any] = {}

    def mean_loss(with_gradient: bool) -> float:
        total = 0.0
        for images, labels in zip(x.split(MINI_BATCH), y.split(MINI_BATCH), strict=True):
            loss = F.cross_entropy(model(images), labels, reduction="sum")
            if with_gradient:
                loss.backward()
            total += loss.item()
        if not with_gradient:
            outputs.update({f"out__{name}": p.detach().clone().numpy() for name, p in model.named_parameters()})
        return total / len(y)

    loss, perturbed_loss = sharpness_losses(model, mean_loss, float(arrays["in__rho"]))
    outputs |= {"out__loss": loss, "out__perturbed_loss": perturbed_loss}
    return compare(arrays, {**outputs, "out__sharpness_unclipped": perturbed_loss - loss})


def gsam(arrays: Arrays) -> Compared:
    """Optimiser steps of the client, with the gradient handed to the optimiser."""
    model, x, y = linear(arrays), _tensor(arrays, "in__x"), _tensor(arrays, "in__y")
    counts = _tensor(arrays, "in__class_counts")
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[str(arrays["in__optimizer"])]
    settings = {"lr": float(arrays["in__lr"]), "weight_decay": float(arrays["in__weight_decay"])}
    optimizer = kind(model.parameters(), **settings)  # type: ignore[arg-type]
    names = ("loss", "weight", "bias", "update_gradient")
    steps: dict[str, list[Tensor]] = {name: [] for name in names}

    def closure() -> dict[str, Tensor]:
        return {"loss": logit_adjusted_cross_entropy(model(x), y, counts)}

    for _ in range(int(arrays["in__steps"])):
        terms = gsam_step(model, optimizer, closure, float(arrays["in__rho"]), float(arrays["in__alpha"]))
        gradients = [p.grad.flatten() for p in (model.weight, model.bias) if p.grad is not None]
        found = (terms["loss"], model.weight.detach(), model.bias.detach(), torch.cat(gradients))
        for name, value in zip(names, found, strict=True):
            steps[name].append(value.clone())
    return compare(arrays, {f"out__{name}": torch.stack(values).numpy() for name, values in steps.items()})


def rho_schedule(arrays: Arrays) -> Compared:
    """Radius that each rule sends, round by round."""
    rho, rounds = float(arrays["in__rho"]), int(arrays["in__rounds"])
    plus = FedISMPlusParams(rho=rho, power=float(arrays["in__power"]))
    rule = {"FedISM": FedISM(FedISMParams(rho=rho)), "FedISM+": FedISMPlus(plus)}[str(arrays["in__algorithm"])]
    rule.config = from_tree({"federation": {"rounds": rounds}})
    sent = [rule.payload(number, "site")[1]["rho"] for number in range(1, rounds + 1)]
    return compare(arrays, {"out__rho_by_round": sent})


def mean(arrays: Arrays) -> Compared:
    """Aggregation with given weights; counters are left out."""
    states = _states(arrays, len(arrays["in__weights"]))
    return compare(arrays, _state_outputs(aggregate(arrays["in__weights"], states)[0]))


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedism__sharpness_weights": weights,
    "fedism__sharpness_weights_robust": weights,
    "fedism__perturb": perturb,
    "fedism__gsam_step": gsam,
    "fedism__rho_schedule": rho_schedule,
    "fedism__aggregate": mean,
}
