"""Adapters from reference vectors to FedMix; see `conformance_methods.py`. Arrays (K, ...) are the sites in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from conformance_methods import Arrays, Compared, _tensor, error

from clients.cross_pseudo import SelectionRule, dice, dice_loss, select
from data_prep.corruption.weak_draw import box_around
from strategies.selected_loss import TwoSums, aggregation_weights, combined, share

WEIGHTS, FLOAT32 = 1e-9, 1e-6
KINDS = {"labeled": "mask", "bbox": "box", "image": "image", "unlabeled": "none"}


def compared(arrays: Arrays, outputs: dict[str, Any], tolerance: float) -> Compared:
    """One entry per output; a key the file does not have is an infinite error. Integers must be equal."""
    return [
        (key, error(value, arrays[key]), 0.0 if arrays[key].dtype.kind in "iub" else tolerance)
        if key in arrays
        else (key, float("inf"), tolerance)
        for key, value in outputs.items()
    ]


def weights(arrays: Arrays) -> Compared:
    """The bare formula over all sites, and the weights over the eligible ones."""
    number, loss = (np.asarray(arrays[key], dtype=np.float64) for key in ("num_selected", "local_loss"))
    lambda_, beta = float(arrays["lambda_"]), float(arrays["beta"])
    data_share, loss_share = share(number), share(loss**beta)
    outputs = {
        "data_share": data_share,
        "loss_share": loss_share,
        "weights": combined(data_share, loss_share, lambda_),
        "weights_required": aggregation_weights(number, loss, lambda_, beta),
    }
    return compared(arrays, outputs, WEIGHTS)


def selection(arrays: Arrays) -> Compared:
    """Refined predictions of the images that are taken; D of all images, that with the box whatever is known."""
    kind = KINDS[str(arrays["supervision"])]
    boxes, tags = _tensor(arrays, "box_mask"), _tensor(arrays, "image_label_mask")
    allowed = {"box": boxes, "image": tags}.get(kind)
    rule = SelectionRule(float(arrays["threshold"]), float(arrays["box_dice_min"]), reject_empty=False)
    found = select(_tensor(arrays, "logits_net1"), _tensor(arrays, "logits_net2"), kind, allowed, rule)
    outputs = {
        "dice_net1_net2": dice(found.second, found.first).numpy(),
        "dice_net1_box": dice(found.first, boxes).numpy(),
        "selected_index": found.keep.nonzero().flatten().numpy(),
        "num_selected": int(found.keep.sum()),
    }
    pseudo = {"pseudo_net1": found.first[found.keep].numpy(), "pseudo_net2": found.second[found.keep].numpy()}
    return compared(arrays, outputs, FLOAT32) + compared(arrays, pseudo, 0.0)


def soft_dice(arrays: Arrays) -> Compared:
    """D as the mean over the batch, the loss and its gradient."""
    prediction, target, eps = _tensor(arrays, "prediction"), _tensor(arrays, "target"), float(arrays["eps"])
    loss = dice_loss(prediction.requires_grad_(), target, eps)
    (gradient,) = torch.autograd.grad(loss, prediction)
    mean = dice(prediction.detach(), target, eps).mean().item()
    return compared(arrays, {"dice": mean, "loss": loss.item(), "grad_prediction": gradient.numpy()}, FLOAT32)


def boxes(arrays: Arrays) -> Compared:
    """Box of each mask with its own margins."""
    filled = np.zeros_like(arrays["mask"])
    for plane, mask, margins in zip(filled, arrays["mask"], arrays["margin_top_bottom_left_right"], strict=True):
        top, bottom, left, right = margins.tolist()
        plane[box_around(mask > 0, (top, bottom, left, right))] = 1
    return compared(arrays, {"box_mask": filled}, 0.0)


def aggregation(arrays: Arrays) -> Compared:
    """The two running sums, given these weights twice (a loss is its own power with beta = 1); counters are left out."""
    used = arrays["weights"].tolist()
    sums = TwoSums(lambda_=10.0, beta=1.0)
    for k, weight in enumerate(used):
        names = [key for key in arrays if key.startswith(f"site{k}__")]
        sums.add({name.removeprefix(f"site{k}__"): _tensor(arrays, name) for name in names}, weight, weight)
    mean = sums.result()
    assert mean is not None
    floating = {f"aggregated__{name}": v.numpy() for name, v in mean.items() if v.is_floating_point()}
    return compared(arrays, floating, FLOAT32)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedmix__aggregation_weights": weights,
    "fedmix__pseudo_label_selection": selection,
    "fedmix__dice": soft_dice,
    "fedmix__box_from_mask": boxes,
    "fedmix__weighted_state_aggregation": aggregation,
}
