"""Plain supervised training: the local half of FedAvg and of every rule that changes only the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.losses.classification import cross_entropy, log_prior, logit_adjusted_cross_entropy
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
    """loss: auto (ce; bce for multi-label and one-class masks; ce_dice for masks of several classes) or a registered loss.
    tau: strength of the logit adjustment, >= 0, 1 in the literature. bce_weight: share of BCE in bce_dice, 0..1."""

    loss: str = "auto"
    tau: float = 1.0
    bce_weight: float = 0.5


class Supervised(Client):
    """One named term: the loss of the configuration on the site's own annotation."""

    Params: ClassVar[type] = Params

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Refuse annotation that leaves pixels open: these losses would take them for background."""
        if self.train_set.ignore_value is not None:
            raise UserError(
                f"{self.data.label_kind} annotation leaves pixels open, which client 'supervised' cannot read; "
                "set data.annotation=mask, or use a client for weak annotation"
            )

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The chosen loss of `output.logits` against `batch.targets`, mean over the batch."""
        name = loss_name(self.params.loss, self.data.task, self.activation)
        logits, targets = output.logits, batch.targets
        if name == "logit_adjusted_ce":
            return {name: logit_adjusted_cross_entropy(logits, targets, tau=self.params.tau, prior=self.prior())}
        if name == "bce_dice":
            return {name: bce_dice(logits, targets, self.params.bce_weight)}
        return {name: _LOSSES[name](logits, targets)}

    def prior(self) -> Tensor:
        """Logarithm of the site's class shares (C,), on its device; made once per message."""
        if not hasattr(self, "_prior"):
            self._prior = log_prior(torch.as_tensor(self.class_counts, device=self.device))
        return self._prior


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
