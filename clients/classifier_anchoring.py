"""FCA: federated classifier anchoring, for classes with long tails that differ from site to site.

Source: Wicaksana et al., "FCA: Taming Long-tailed Federated Medical Image Classification by Classifier Anchoring",
arXiv 2305.00738, and its official code. The server rule is FedAvg.
Symbols: h → features, z1 = W1·h → federated logits, z2 = W2·h → personal logits, p = softmax(z), π_k → class shares of
the site, L1 → term `fed`, L2 → term `per`, L_con → term `con`.

W1 is trained by everybody and anchored by W2, which never leaves the site.

Departures: W2 is never sent (the official code averages it at the server, and judges the average); the consistency is a
proper KL divergence, `consistency=released` gives the official term; the global model is judged with W1 and the
personal one with W2 (official: the other way round). Both heads use the site's own class shares, as in the code.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.losses.anchoring import anchored_kl, focal_cross_entropy, released_consistency
from fedmed.losses.classification import cross_entropy, log_prior, logit_adjusted_cross_entropy
from fedmed.models.heads import probabilities
from fedmed.models.output import Output
from fedmed.models.two_heads import PERSONAL_LOGITS, TwoHeads, is_personal_head

log = logging.getLogger("fedmed.fca")

PRIOR_EPS = 1e-9  # added to a class share before the logarithm (official code)
_LOSSES = ("bsm", "ce", "focal")
_CONSISTENCIES = {"kl": anchored_kl, "released": released_consistency}


@dataclass(frozen=True)
class ClassifierAnchoringParams:
    """Constants of FCA."""

    lambda_fed: float = 1.0  # ≥ 0, weight of L1, the federated head's loss (official code)
    lambda_per: float = 3.0  # ≥ 0, weight of L2, the personal head's loss (official code)
    lambda_con: float = 1.0  # ≥ 0, weight of the consistency (official code); 0: the heads share the features only
    loss: str = "bsm"  # of both heads: bsm (balanced softmax) | ce | focal (official code)
    gamma: float = 1.0  # ≥ 0, exponent of `focal` (official code)
    consistency: str = "kl"  # kl | released, the official code's term, see Departures

    def __post_init__(self) -> None:
        for name in ("lambda_fed", "lambda_per", "lambda_con", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"a finite {name} >= 0 expected, got {value}")
        for name, known in (("loss", _LOSSES), ("consistency", tuple(_CONSISTENCIES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: one of {', '.join(known)} expected, got {getattr(self, name)!r}")


def head_loss(logits: Tensor, targets: Tensor, log_shares: Tensor, params: ClassifierAnchoringParams) -> Tensor:
    """L1 or L2: cross-entropy of z + ln(π_k + 1e-9), or the plain or focal one of z; mean over the batch.

    logits (B, C), targets (B,) int64, log_shares ln(π_k + 1e-9) (C,). Out: scalar.
    """
    if params.loss == "bsm":
        return logit_adjusted_cross_entropy(logits, targets, prior=log_shares)
    return cross_entropy(logits, targets) if params.loss == "ce" else focal_cross_entropy(logits, targets, params.gamma)


def fca_terms(
    federated: Tensor, personal: Tensor, targets: Tensor, log_shares: Tensor, params: ClassifierAnchoringParams
) -> dict[str, Tensor]:
    """The three terms, weighted: L = λ_fed·L1 + λ_per·L2 + λ_con·L_con is their sum.

    In: z1 and z2 (B, C), labels (B,) int64, ln(π_k + 1e-9) (C,). L_con gives no gradient to z2, and none through it to
    the features.
    """
    consistency = _CONSISTENCIES[params.consistency]
    return {
        "fed": params.lambda_fed * head_loss(federated, targets, log_shares, params),
        "per": params.lambda_per * head_loss(personal, targets, log_shares, params),
        "con": params.lambda_con * consistency(federated, personal),
    }


class ClassifierAnchoring(Client):
    """Trains both heads on the same batches; W2 stays at the site and is the view `personal`, W1 is the view `global`."""

    Params = ClassifierAnchoringParams
    views: ClassVar[tuple[str, ...]] = ("global", "personal")
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    @staticmethod
    def is_personal(name: str, module: nn.Module) -> bool:
        """True for the second head of model `two_heads`."""
        return is_personal_head(name, module)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Take the class shares of the site; refuse a model with one head."""
        if not isinstance(self.model, TwoHeads):
            raise UserError(
                f"FCA trains two heads, model {self.config.model.name!r} has one; set model.name=two_heads and "
                "model.args.name to the network"
            )
        counts = torch.as_tensor(self.class_counts, device=self.device)
        if not self.personal and int((counts > 0).sum()) <= 1:
            log.warning("%s: all training items are of one class; its balanced losses are almost 0", self.site)
        self.log_shares = log_prior(counts, PRIOR_EPS)

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The weighted terms of one batch."""
        return fca_terms(output.logits, personal_logits(output), batch.targets, self.log_shares, self.params)

    def predict(self, batch: Batch, view: str) -> Tensor:
        """Probabilities of the federated head, in the view `personal` of the personal one."""
        output = self.forward(batch)
        logits = personal_logits(output) if view == "personal" else output.logits
        return probabilities(logits, self.activation)


def personal_logits(output: Output) -> Tensor:
    """z2 (B, C) of an output of `two_heads`, in the type of z1."""
    assert output.aux is not None
    logits: Tensor = output.aux[PERSONAL_LOGITS]
    return logits.to(output.logits.dtype)
