"""FedNPR: features are held near the prototypes of their class, as an add-on for any client that trains a classifier.

Source: Wicaksana et al., "Non-parametric regularization for class imbalance federated medical image classification",
2024, arXiv 2407.12446, and its official code. Non-parametric: a class stands as K directions in feature space that are
computed, not learned.
Symbols: f → features (B, D), u = f/‖f‖, P → prototypes (C, K, D), s_nc = max_k u_n·P_ck, l = LayerNorm_C(s), λ → lam.
Term: λ·L_npr, L_npr = mean cross-entropy of l. The base loss (balanced softmax in FedNPR) is the client's own.

Departures from the official code: λ multiplies (there it is added, which leaves a weight of 1); prototypes come from one
ordered pass of the received model in eval mode over unaugmented images (there: augmented, in training mode at first);
the assignment is a balanced Sinkhorn plan (there: close to a uniform draw, `assignment: random`); a sub-cluster that
gets nothing keeps its prototype (there: 0); features without direction count nowhere.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import AddOn, Client
from fedmed.losses.prototypes import hard_assignment, npr_loss, refresh_prototypes, sinkhorn_plan
from fedmed.models.output import Output

log = logging.getLogger("fedmed.site")

PROTOTYPES, VALID = "npr/prototypes", "npr/valid"  # keys of the personal state
INITIAL_STD, INITIAL_CUT = 0.02, 2.0  # of the truncated normal that prototypes start from (official)


@dataclass(frozen=True)
class PrototypeRegulariserParams:
    """Constants of the term; defaults are the published ones unless marked."""

    enabled: bool = False  # switches the add-on on
    lam: float = 0.05  # λ ≥ 0; 1 has the gradient of the official code, which adds λ instead of multiplying by it
    num_prototypes: int = 4  # K ≥ 1, prototypes of a class
    assignment: str = "sinkhorn"  # sinkhorn: balanced | random: uniform draw, which is what the official code comes to
    sinkhorn_epsilon: float = 0.05  # ε ≥ 1e-6, entropy of the plan
    sinkhorn_iterations: int = 3  # ≥ 1 (our choice; the official solver is another one)
    valid_classes_only: bool = False  # only classes with a computed prototype compete (our option; official: all)

    def __post_init__(self) -> None:
        if not (0 <= self.lam < math.inf and self.num_prototypes >= 1):
            raise ValueError(
                f"a finite lam >= 0 and num_prototypes >= 1 expected, got {self.lam}, {self.num_prototypes}"
            )
        if self.assignment not in ("sinkhorn", "random"):
            raise ValueError(f"assignment: expected sinkhorn or random, got {self.assignment!r}")
        if not (1e-6 <= self.sinkhorn_epsilon < math.inf and self.sinkhorn_iterations >= 1):
            raise ValueError(
                "a finite sinkhorn_epsilon >= 1e-6 and sinkhorn_iterations >= 1 expected, "
                f"got {self.sinkhorn_epsilon}, {self.sinkhorn_iterations}"
            )


def initial_prototypes(num_classes: int, num_prototypes: int, dim: int, rng: torch.Generator) -> Tensor:
    """Truncated normal numbers, (C, K, D) float32."""
    empty = torch.empty(num_classes, num_prototypes, dim)
    return torch.nn.init.trunc_normal_(empty, std=INITIAL_STD, a=-INITIAL_CUT, b=INITIAL_CUT, generator=rng)


def pooled(features: Tensor) -> Tensor:
    """Features (B, D), or the mean over space of (B, D, *), in float32 at least."""
    flat = features.flatten(2).mean(dim=2) if features.ndim > 2 else features
    return flat if flat.dtype == torch.float64 else flat.float()


class PrototypeRegulariser(AddOn):
    """Adds the term `npr`. Prototypes stay at the site: those of a rare class are close to single patients' features.

    Costs one pass over the training split a round, and holds its features (N, D) during `begin_round`; a step needs no
    second forward pass.
    """

    Params = PrototypeRegulariserParams

    def begin_round(self, client: Client, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Compute the prototypes of this round with the received extractor, and keep them."""
        if client.data.task != "classification":
            raise UserError(
                f"add-on npr needs one class per image, the task here is {client.data.task}; set client.npr.enabled=false"
            )
        self.rng = client.rng("npr")
        features, labels = self._sweep(client)
        if len(features) == 0:
            return  # nothing to train on either
        kept, valid = self._kept(client, features.shape[1])
        prototypes, new = refresh_prototypes(features, labels, kept.to(client.device), self._assign)
        valid = valid | new.cpu()
        client.personal = {**client.personal, PROTOTYPES: prototypes.cpu(), VALID: valid}
        self.prototypes = prototypes
        self.classes = valid.nonzero().flatten().to(client.device) if self.params.valid_classes_only else None

    def loss(self, client: Client, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """λ·L_npr of the features of the batch."""
        features = pooled(self._features(client, output))
        return {"npr": self.params.lam * npr_loss(features, self.prototypes, batch.targets, self.classes)}

    def _assign(self, similarity: Tensor) -> Tensor:
        if self.params.assignment == "random":
            n, k = similarity.shape
            return torch.randint(k, (n,), generator=self.rng).to(similarity.device)
        params = self.params
        return hard_assignment(sinkhorn_plan(similarity, params.sinkhorn_epsilon, params.sinkhorn_iterations))

    def _sweep(self, client: Client) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of everything the round trains on."""
        features, labels = [], []
        for batch, output in client.sweep(client.train_set):
            features.append(pooled(self._features(client, output)))
            labels.append(batch.targets)
        return (torch.cat(features), torch.cat(labels)) if features else (torch.zeros(0, 0), torch.zeros(0).long())

    def _kept(self, client: Client, dim: int) -> tuple[Tensor, Tensor]:
        """Prototypes of the last round and which classes have one that was computed; initial ones if there are none that fit."""
        shape = (len(client.data.classes), self.params.num_prototypes, dim)
        kept = client.personal.get(PROTOTYPES)
        if kept is not None and tuple(kept.shape) == shape:
            return kept, client.personal[VALID]
        if kept is not None:
            log.warning("site %s: kept prototypes are %s, now %s: new ones", client.site, tuple(kept.shape), shape)
        return initial_prototypes(*shape, self.rng), torch.zeros(shape[0], dtype=torch.bool)

    @staticmethod
    def _features(client: Client, output: Output) -> Tensor:
        """Raises `UserError` for a model that gives no features."""
        if output.features is None:
            raise UserError(
                f"add-on npr reads what enters the classifier, which model {client.config.model.name!r} does not give; "
                "choose a model with features (small_cnn), or set client.npr.enabled=false"
            )
        return output.features
