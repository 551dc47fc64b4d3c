"""Adapters from reference vectors to FCA; see `conformance_methods.py`. Arrays (K, ...) are the sites in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from conformance_methods import TOLERANCE, Arrays, Compared, _tensor, error
from torch import nn

from clients.classifier_anchoring import PRIOR_EPS, ClassifierAnchoring, ClassifierAnchoringParams, fca_terms
from fedmed.federation.layout import Layout
from fedmed.federation.state import State, clone_state, copy_state, weighted_mean
from fedmed.losses.classification import log_prior
from fedmed.metrics.classification import class_recall, one_hot, predicted_class, rank_scores
from fedmed.metrics.segmentation import known_mean
from fedmed.report.personal import pair, specialisation

RELEASED_AUC_TOLERANCE = 1e-6
COUNTER = "num_batches_tracked"


def compared(arrays: Arrays, outputs: dict[str, Any], tolerance: float = TOLERANCE) -> Compared:
    """One entry per output; a key the file does not have is an infinite error."""
    return [(k, error(v, arrays[k]) if k in arrays else float("inf"), tolerance) for k, v in outputs.items()]


def total_loss(arrays: Arrays) -> Compared:
    """Terms, total and gradients, with either consistency."""
    labels = _tensor(arrays, "labels").long()
    log_shares = log_prior(_tensor(arrays, "class_counts"), PRIOR_EPS)
    names = {"lambda_fed": "lambda_federated", "lambda_per": "lambda_personal", "lambda_con": "lambda_consistency"}
    weights = {ours: float(arrays[theirs]) for ours, theirs in names.items()}
    ones = dict.fromkeys(weights, 1.0)
    outputs: dict[str, Any] = {}
    for consistency, suffix in (("kl", "kl"), ("released", "released_code")):
        federated, personal = (_tensor(arrays, f"logits_{head}").requires_grad_() for head in ("federated", "personal"))
        plain = fca_terms(federated, personal, labels, log_shares, params(consistency, **ones))
        terms = fca_terms(federated, personal, labels, log_shares, params(consistency, **weights))
        total = torch.stack(list(terms.values())).sum()
        gradients = torch.autograd.grad(total, (federated, personal))
        outputs |= {"loss_federated": plain["fed"].item(), "loss_personal": plain["per"].item()}
        outputs |= {f"consistency_{suffix}": plain["con"].item(), f"total_{suffix}": total.item()}
        outputs |= {f"grad_{h}_{suffix}": g.numpy() for h, g in zip(("federated", "personal"), gradients, strict=True)}
    return compared(arrays, outputs)


def params(consistency: str, **weights: float) -> ClassifierAnchoringParams:
    """Balanced softmax with these weights."""
    return ClassifierAnchoringParams(consistency=consistency, **weights)


class Network(nn.Module):
    """The small network of the files, its entries in double precision."""

    def __init__(self, state: State) -> None:
        super().__init__()
        classes, width = state["standard_head.weight"].shape
        self.feat = nn.Conv2d(state["feat.weight"].shape[1], width, state["feat.weight"].shape[-1])
        self.bn = nn.BatchNorm2d(width)
        self.standard_head, self.standard_head2 = nn.Linear(width, classes), nn.Linear(width, classes)
        self.standard_head2.is_personal_head = True  # type: ignore[assignment]
        self.double()
        copy_state(state, self.state_dict())


def aggregation(arrays: Arrays) -> Compared:
    """Weighted mean, and what a site has after the download: only exchanged entries arrive. The counter is the maximum."""
    sizes = arrays["client_sizes"].tolist()
    entries = [key.removeprefix("client0_before__") for key in arrays if key.startswith("client0_before__")]
    states = [{name: _tensor(arrays, f"client{k}_before__{name}") for name in entries} for k in range(len(sizes))]
    mean = weighted_mean(zip([float(n) for n in sizes], states, strict=True))
    assert mean is not None
    model = Network(states[0])
    layout = Layout.of(model, ClassifierAnchoring.is_personal)
    sent = {name: mean[name] for name in layout.exchanged}
    copy_state(sent, model.state_dict())
    after = clone_state(model.state_dict())
    floating = [name for name in entries if mean[name].is_floating_point()]
    outputs: dict[str, Any] = {f"global_released__{name}": mean[name].numpy() for name in floating}
    outputs |= {f"client0_after_download__{name}": after[name].numpy() for name in floating}
    outputs[f"{COUNTER}_max"] = after[f"bn.{COUNTER}"].numpy()
    return compared(arrays, outputs)


def released_auc(labels: Any, scores: Any) -> float:
    """Mean over the classes present of the area under the ROC curve interpolated at 1000 false-positive rates."""
    from sklearn.metrics import roc_curve

    grid, areas = np.linspace(0, 1, 1000), []
    for c in np.unique(labels):
        fpr, tpr, _ = roc_curve(labels == c, scores[:, c])
        height = np.interp(grid, fpr, tpr)
        areas.append((height[1:] + height[:-1]).sum() / 2 / (len(grid) - 1))
    return float(np.mean(areas))


def softmax(logits: Any) -> Any:
    return torch.softmax(torch.from_numpy(np.array(logits)), dim=1).numpy()


def generalisation_specialisation(arrays: Arrays) -> Compared:
    """The pair with its means; the released metric routine is written out here, the project does not use it."""
    labels, common, own = arrays["labels"], arrays["federated_logits"], arrays["personal_logits"]
    classes = common.shape[-1]
    pooled, pooled_probs = labels.reshape(-1), softmax(common.reshape(-1, classes))

    def bacc(truth: Any, probs: Any) -> float:
        return known_mean(class_recall(truth, predicted_class(probs), classes))

    def auc(truth: Any, probs: Any) -> Any:
        return rank_scores(one_hot(truth, classes), probs)

    sites = [(truth, softmax(logits)) for truth, logits in zip(labels, own, strict=True)]
    baccs, aucs = [bacc(*site) for site in sites], [auc(*site) for site in sites]
    generalisation_auc = auc(pooled, pooled_probs)
    found = pair(bacc(pooled, pooled_probs), specialisation({str(k): v for k, v in enumerate(baccs)}))
    outputs: dict[str, Any] = {
        "generalisation_bacc": found["G"],
        "specialisation_bacc_per_client": baccs,
        "specialisation_bacc": found["S"],
        "generalisation_auc_per_class": generalisation_auc,
        "specialisation_auc_per_class": aucs,
        "generalisation_auc": known_mean(generalisation_auc),
        "specialisation_auc": specialisation({str(k): known_mean(a) for k, a in enumerate(aucs)}),
        "mean_bacc": found["mean"],
        "harmonic_bacc": found["harmonic"],
        "released_bacc_pooled_global": bacc(pooled, softmax(pooled_probs)),
        "released_bacc_client0": baccs[0],
    }
    released = {
        "released_auc_pooled_global": released_auc(pooled, softmax(pooled_probs)),
        "released_auc_client0": released_auc(*sites[0]),
    }
    return compared(arrays, outputs) + compared(arrays, released, RELEASED_AUC_TOLERANCE)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fca__total_loss": total_loss,
    "fca__aggregation_personal_head": aggregation,
    "fca__generalisation_specialisation": generalisation_specialisation,
}
