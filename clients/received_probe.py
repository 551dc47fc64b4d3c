"""Plain training that also tells how the received model does here: the local half of the rules for fairness between sites.

`LossProbe` serves q-FedAvg, agnostic FL and FedGA, `AccuracyProbe` FairFed; see `strategies/q_fair.py`, `agnostic.py`,
`generalization_gap.py` and `fair_gap.py`. Both measure before training, in one ordered pass over the training split, in
eval mode and without augmentation, so that sites and rounds are compared on the same footing. N items, C classes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.supervised import Supervised
from fedmed.federation.messages import Leaf
from fedmed.metrics.classification import class_recall, predicted_class
from fedmed.models.heads import probabilities


def mean_over_items(losses: list[Tensor], sizes: list[int]) -> float:
    """Mean of batch means, weighted by the batch sizes: Σ_b n_b ℓ_b / Σ_b n_b in float64. NaN without items."""
    if sum(sizes) == 0:
        return math.nan
    means = torch.stack([loss.detach() for loss in losses]).double().cpu()  # one transfer from the device
    return float((means * torch.tensor(sizes, dtype=torch.float64)).sum() / sum(sizes))


def balanced_accuracy(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int) -> float:
    """Mean recall over the classes that occur in `labels`. (N,), (N,) with −1 = no prediction. NaN without items."""
    recall = class_recall(labels, predicted, num_classes)
    known = ~np.isnan(recall)
    return float(recall[known].mean()) if known.any() else math.nan


class LossProbe(Supervised):
    """Sends the loss of the received model. It is the configured training loss as it is: with
    `loss: logit_adjusted_ce` the adjustment by the site's own class shares is in it. Terms of add-ons are not.

    A Dice term is a mean over batches, so its value depends a little on `training.batch_size`.
    """

    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("loss_received", "1", "mean training loss of the received model over the training split", min_count=1),
    )

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Measure while the model is still the received one."""
        super().begin_round(config, extras)
        losses, sizes = [], []
        for batch, output in self.sweep(self.train_set):
            losses.append(torch.stack(list(self.loss(output, batch, 0).values())).sum())
            sizes.append(len(batch))
        self.loss_received = mean_over_items(losses, sizes)

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send it with the update."""
        return {}, {"loss_received": self.loss_received}


class AccuracyProbe(Supervised):
    """Sends the balanced accuracy of the received model over the classes the site has."""

    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("bacc_received", "1", "balanced accuracy of the received model on the training split", min_count=1),
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Measure while the model is still the received one."""
        super().begin_round(config, extras)
        labels, predicted = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for batch, output in self.sweep(self.train_set):
            probs = probabilities(output.logits, self.activation).cpu().double().numpy()
            predicted.append(predicted_class(probs))
            labels.append(batch.targets.cpu().numpy())
        self.bacc_received = balanced_accuracy(
            np.concatenate(labels), np.concatenate(predicted), self.train_set.num_classes
        )

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send it with the update."""
        return {}, {"bacc_received": self.bacc_received}
