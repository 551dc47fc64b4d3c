"""Adapters from reference vectors to the tree filter and the tree energy loss; see `conformance_methods`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from conformance_methods import error
from torch import Tensor

from fedmed.losses.tree_energy import affinities, resized, tree_energy_loss
from fedmed.losses.tree_filter import Tree, minimum_spanning_tree, tree_filter, tree_from_edges

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]

TOLERANCE = 1e-9


def tensor(arrays: Arrays, key: str, grad: bool = False) -> Tensor:
    """A copy as tensor; float64 for numbers that are differentiated."""
    value = torch.from_numpy(np.array(arrays[key]))
    return value.double().requires_grad_() if grad else value


def same_edges(found: Tree, given: Tree) -> float:
    """0 when both have the same edges, else infinity."""
    return 0.0 if torch.equal(found.edges(), given.edges()) else float("inf")


def filtering(arrays: Arrays) -> Compared:
    """Filtered feature and both gradients along the given tree; the tree itself unless its choice was free."""
    feature, guide = tensor(arrays, "feature_in", True), tensor(arrays, "embedding", True)
    tree = tree_from_edges(tensor(arrays, "tree_edges"), *feature.shape[2:])
    result = tree_filter(feature, guide, float(arrays["sigma"]), tree)
    grads = torch.autograd.grad(result, (feature, guide), tensor(arrays, "grad_out").double())
    outputs = {"feature_out": result.detach(), "grad_feature_in": grads[0], "grad_embedding": grads[1]}
    lines = [(key, error(value, arrays[key]), TOLERANCE) for key, value in outputs.items()]
    if "note_all_edge_weights_equal" not in arrays:
        lines.append(("tree_edges", same_edges(minimum_spanning_tree(guide), tree), 0.0))
    return lines


def energy(arrays: Arrays) -> Compared:
    """The three forms of the loss, every filtered prediction of the cascade and all gradients, along the given trees."""
    count = sum(key.startswith("high_feature_") for key in arrays)
    logits, image = tensor(arrays, "logits", True), tensor(arrays, "low_feature").double()
    features = [tensor(arrays, f"high_feature_{m}", True) for m in range(1, count + 1)]
    mask, size = tensor(arrays, "unlabelled_mask"), (logits.shape[2], logits.shape[3])
    trees = [tree_from_edges(tensor(arrays, f"tree_edges_{m}"), *size) for m in range(count + 1)]
    options: dict[str, Any] = {"sigma_low": float(arrays["sigma_low"]), "trees": trees}
    losses = {
        f: tree_energy_loss(logits, image, features, mask, form=f, **options) for f in ("cascade", "single", "add")
    }
    outputs: dict[str, Any] = {f"loss_{form}_unweighted": loss.item() for form, loss in losses.items()}
    grads = torch.autograd.grad(losses["cascade"], (logits, *features))
    outputs["grad_logits_cascade"] = grads[0]
    outputs |= {f"grad_high_feature_{m}": grad for m, grad in enumerate(grads[1:], 1)}
    found = [a.detach() for a in affinities(logits.softmax(dim=1), image, features, **options)]
    outputs |= {"affinity_low": found[0]} | {f"affinity_high_{m}": a for m, a in enumerate(found[1:], 1)}
    outputs["num_unlabelled"] = int(mask.sum())
    lines = [(key, error(value, arrays[key]), TOLERANCE) for key, value in outputs.items()]
    if float(arrays["min_edge_weight_gap"]) > 0:
        built = [minimum_spanning_tree(resized(guide, size)) for guide in (image, *features)]
        lines += [(f"tree_edges_{m}", same_edges(built[m], trees[m]), 0.0) for m in range(count + 1)]
    return lines


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "weak_losses__tree_filter": filtering,
    "weak_losses__tree_energy": energy,
}
