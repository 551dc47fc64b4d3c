"""FedICRA, local half: weak annotation of another kind at each site, a network told the site, and channels that differ by site.

Source: FedICRA, arXiv 2304.05635, and its official code. The server rule is FedAvg. `fedmed/models/site_unet.py` is the
network, `clients/merging.py` what happens before a round is trained, `clients/weak_annotation.py` the rest of the objective.
Symbols: K sites, i → this one, B batch, f channels, h(x, s_k) → heatmap of a batch for site k, α → alpha, rep_iters → body_steps.

    L_con = - 1/(K-1) Σ_(k ≠ i) mean((h(x, s_i) - stopgrad h(x, s_k))²)
    L     = pCE + 0.1 L_CRF + 0.1 TEL + α L_con

A round first trains the last convolution alone, then, for its last `body_steps` steps, everything else.

Departures: L_con comes from one feature tensor (official: the network runs once more for every other site, with other dropout
and another update of the norm statistics); site 0 is a site like any other (there its term is 0); all of h is trained (there it
keeps the values it was drawn with, see the model); sites are weighted by images (there: by batches). The two phases are one
optimiser here: it passes over parameters without gradient, so each part has the moments and the weight decay of its own
steps only, as with an optimiser for each.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clients.merging import MergingClient, MergingParams
from clients.weak_annotation import WeakParams, weak_terms
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.models.output import Output
from fedmed.models.site_unet import DEEPEST, HEATMAP, ChannelSelection, site_heatmaps

log = logging.getLogger("fedmed.fedicra")

HEAD = "decoder.out_conv"  # what the first phase trains


@dataclass(frozen=True)
class SiteContrastParams(MergingParams, WeakParams):
    """Constants of FedICRA, of the merge and of the objective."""

    crf_weight: float = 0.1  # λ_crf ≥ 0, weight of the gated CRF term (official code); 0: the term is left out
    tree_weight: float = 0.1  # λ_tree ≥ 0, weight of the tree energy term (official code); 0: left out
    alpha: float = 0.5  # α ≥ 0, weight of the contrast (official default; project page: 1); 0: left out
    body_steps: int = 3  # ≥ 0, last steps of a round, which train all but the last convolution (official code: 3 of 10)

    def __post_init__(self) -> None:
        MergingParams.__post_init__(self)
        WeakParams.__post_init__(self)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"a finite alpha >= 0 expected, got {self.alpha}")
        if self.body_steps < 0:
            raise ValueError(f"body_steps >= 0 expected, got {self.body_steps}")


def site_contrast(own: Tensor, others: Tensor) -> Tensor:
    """L_con: minus the mean over the other sites of the mean squared distance of their heatmaps from the own.

    own h(x, s_i) (B, f); others h(x, s_k) (K - 1, B, f), which get no gradient. Out: scalar in [-1, 0]; one site alone: 0.
    """
    if not len(others):
        return own.new_zeros(())
    return -(own - others.detach()).square().mean()


def head_steps(num_steps: int, body_steps: int) -> int:
    """Steps of the first phase: those the second leaves over, but one at least (a round of one step trains the head alone)."""
    return min(num_steps, max(1, num_steps - body_steps))


def split_head(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of the last convolution, and all others."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if name.startswith(HEAD + ".")]
    return head, [parameter for name, parameter in trained if not name.startswith(HEAD + ".")]


class SiteContrast(MergingClient):
    """Merges, then trains in two phases with a contrast to the heatmaps the other sites would have on the same images.

    The view `personal` is the site's own model after its last round, merged decoder included.
    """

    Params: ClassVar[type] = SiteContrastParams
    merge_prefixes: ClassVar[tuple[str, ...]] = (
        "decoder.up1",
        "decoder.up2",
        "decoder.up3",
        "decoder.up4",
        "decoder.out_conv",
    )

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Merge, then part the parameters and the steps of the round. Raises `UserError` for a model without selection."""
        selection = getattr(self.model, "selection", None)
        if not isinstance(selection, ChannelSelection):
            raise UserError(
                f"FedICRA needs a network that is told the site, model {self.config.model.name!r} is not; "
                "set model.name=site_unet"
            )
        super().begin_round(config, extras)
        self.selection = selection
        self.head, self.body = split_head(self.model)
        steps = self.num_steps()
        self.head_steps = head_steps(steps, self.params.body_steps)
        if steps == 1 and self.round <= 1 and self.params.body_steps:
            log.warning(
                "%s: its rounds are one step long and train the last convolution only; set training.epochs higher or "
                "training.batch_size lower",
                self.site,
            )
        self.other_sites = torch.tensor(self._other_sites(), dtype=torch.int64, device=self.device)

    def _other_sites(self) -> list[int]:
        """Indices of the other sites of the run; none where a message does not say which site this one is."""
        if self.site_index < 0:
            return []
        return [k for k in range(min(self.num_sites, self.selection.site_in.in_features)) if k != self.site_index]

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One step of the head or, from step `head_steps` on, of everything else; the part at rest has no gradient."""
        assert self.optimizer is not None
        self.set_lr(self.optimizer, step)
        terms = self.loss_terms(batch, step)
        self.optimizer.zero_grad(set_to_none=True)
        active = self.head if step < self.head_steps else self.body
        torch.stack(list(terms.values())).sum().backward(inputs=active)
        self.optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The terms pce, crf, tree and contrast, weighted; without those of weight 0."""
        terms = weak_terms(output, batch, self.train_set.ignore_value, self.params)
        if self.params.alpha == 0:
            return terms
        return {**terms, "contrast": self.params.alpha * self._contrast(output)}

    def _contrast(self, output: Output) -> Tensor:
        assert output.aux is not None
        with torch.no_grad():
            others = site_heatmaps(self.selection, output.aux[DEEPEST], self.other_sites)
        return site_contrast(output.aux[HEATMAP], others)
