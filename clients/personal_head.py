"""Supervised training with a classifier of one's own: the extractor is averaged, the classifier never travels.

Source: FedNPR-Per, the personalised mode of FedNPR (Wicaksana et al., 2024, arXiv 2407.12446), in which both published notebooks are run. The server rule is
FedAvg. A site is judged by the received extractor under its own classifier; a global model does not exist, because the
server never sees a trained classifier.

Departures: the classifier is not sent at all (official: sent, averaged, and then read by nobody), and all sites start
from that of the run's seed (official: every site draws its own).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from clients.supervised import Supervised
from fedmed.errors import UserError
from fedmed.models.build import is_classifier


class PersonalHead(Supervised):
    """Supervised training whose classifier is personal: every entry below the model's `classifier_prefixes`."""

    views: ClassVar[tuple[str, ...]] = ("personal",)

    @staticmethod
    def is_personal(name: str, module: nn.Module) -> bool:
        """True for every entry of the classifier."""
        return is_classifier(name, module)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Refuse a model without a known classifier: the method would silently be FedAvg."""
        super().begin_round(config, extras)
        if not self.layout.personal:
            raise UserError(
                f"client personal_head keeps the classifier at the site, but model {self.config.model.name!r} does not say "
                "which modules that is (`classifier_prefixes`); choose another model, or client.name=supervised"
            )
