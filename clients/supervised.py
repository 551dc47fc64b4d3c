"""Plain supervised training: the local half of FedAvg and of every rule that changes only the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmed.data.site_file import SiteData
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.losses.classification import binary_cross_entropy, cross_entropy, log_prior, logit_adjusted_cross_entropy
from fedmed.losses.segmentation import bce_dice, bce_with_logits, ce_dice, dice
from fedmed.models.output import Output

_AUTO = {
    ("classification", "softmax"): "ce",
    ("multilabel", "sigmoid"): "bce",
    ("segmentation", "sigmoid"): "bce",
    ("segmentation", "softmax"): "ce_dice",
}
_FITS = {
    "ce": (("classification", "softmax"), ("segmentation", "softmax")),
    "logit_adjusted_ce": (("classification", "softmax"),),
    "bce": (("multilabel", "sigmoid"), ("segmentation", "sigmoid")),
    "bce_dice": (("segmentation", "sigmoid"),),
    "ce_dice": (("segmentation", "softmax"),),
    "dice": (("segmentation", "softmax"),),
}
_LOSSES = {"ce": cross_entropy, "bce": bce_with_logits, "ce_dice": ce_dice, "dice": dice}


@dataclass(frozen=True)
class Params:
    """Arguments of supervised training; clients that build on its loss build on these."""

    loss: str = (
        "auto"  # auto: ce; bce for multi-label and one-class masks, ce_dice for more classes; or a registered loss
    )
    tau: float = 1.0  # strength of the logit adjustment, ≥ 0; 1 in the literature, 0 is plain cross-entropy
    bce_weight: float = 0.5  # share of BCE in bce_dice, 0..1
    prior_eps: float | None = None  # > 0, added to the class shares before ln π (FedNPR: 1e-9); null: ln 0 = −∞
    missing: str = "mask"  # labels of classes that are not annotated: "mask" leaves them out, "negative" reads 0

    def __post_init__(self) -> None:
        if self.missing not in ("mask", "negative"):
            raise ValueError(f"missing: expected mask or negative, got {self.missing!r}")
        if self.prior_eps is not None and not self.prior_eps > 0:
            raise ValueError(f"prior_eps > 0 or null expected, got {self.prior_eps}")


class Supervised(Client):
    """One named term: the loss of the configuration on the site's own annotation."""

    Params: ClassVar[type] = Params

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Refuse annotation that leaves pixels open: these losses would take them for background."""
        if self.train_set.ignore_value is not None:
            raise UserError(refusal(self.data, self.config.client.name))

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The chosen loss of `output.logits` against `batch.targets`, mean over the batch."""
        name = loss_name(self.params.loss, self.data.task, self.activation)
        logits, targets = output.logits, batch.targets
        if name == "logit_adjusted_ce":
            return {name: logit_adjusted_cross_entropy(logits, targets, tau=self.params.tau, prior=self.prior())}
        if name == "bce_dice":
            return {name: bce_dice(logits, targets, self.params.bce_weight)}
        active = self._active(batch)
        if active is not None:
            return {name: binary_cross_entropy(logits, targets, active)}
        return {name: _LOSSES[name](logits, targets)}

    def _active(self, batch: Batch) -> Tensor | None:
        """The label entries (B, L) that are annotation, a 0 of a missing class is none; None: all of them."""
        if self.data.task != "multilabel" or self.params.missing == "negative":
            return None
        return self.data.annotated(batch)

    def prior(self) -> Tensor:
        """Logarithm of the site's class shares (C,), on its device; made once per message."""
        if not hasattr(self, "_prior"):
            counts = torch.as_tensor(self.class_counts, device=self.device)
            self._prior = log_prior(counts, self.params.prior_eps)
        return self._prior


def refusal(data: SiteData, client: str) -> str:
    """Why a client for full masks does not read the annotation of this site, and what to set instead.

    `data.annotation=mask` is named only where it would help: where every training image has a full mask, too.
    """
    if data.label_kind == "box":
        reason = f"box annotation is filled rectangles, not contours, which client {client!r} would learn as such"
        way = "to train on the rectangles all the same, set"
    else:
        reason = f"{data.label_kind} annotation leaves pixels open, which client {client!r} cannot read"
        way = "set"
    masks, rows = data.eval_target, data.splits["train"]
    parts = (rows[start : start + 64] for start in range(0, len(rows), 64))  # masks may stay in the file
    there = masks is not None and all(bool((masks[part] < data.num_classes).all()) for part in parts)
    other = ", or data.annotation=mask for the full masks this site has, too" if there else ""
    return f"{reason}; {way} client.name=weak client.args=null model.activation=softmax{other}"


def loss_name(name: str, task: str, activation: str) -> str:
    """Resolve `auto` and check that loss, task and activation fit. Raises `UserError`."""
    if name == "auto":
        return _AUTO[task, activation]
    if (task, activation) not in _FITS.get(name, ()):
        fitting = [n for n, pairs in _FITS.items() if (task, activation) in pairs]
        raise UserError(
            f"client.args.loss: {name!r} does not fit {task} with {activation} outputs; fitting: auto, {', '.join(fitting)}"
        )
    return name
