"""FedLPPA, local half: sparse annotation, pseudo-labels of two decoders, and prompts that hold the sites apart.

Source: "FedLPPA: Learning Personalized Prompt and Aggregation for Federated Weakly-supervised Medical Image Segmentation",
arXiv 2402.17502, and its official code. `strategies/prompt_affinity.py` is the server, `fedmed/models/prompt_unet.py` the
network, `clients/merging.py` how the received main decoder is merged into the site's own.
Symbols: z, z' → logits of main and auxiliary decoder, F_i, F_k → fused features with the prompt of the own and of another
site, y → annotation, ŷ → pseudo-labels, m → share, α → alpha, β → beta, K sites.

    L     = pCE(z, y) + α L_uni + β L_pls
    L_uni = - mean over k ≠ i of min(gap(F_i, F_k), limit), F_k without gradient; 0 for one site
    ŷ     = argmax of m softmax z + (1 - m) softmax z', m drawn from U(0, 1) in every step
    L_pls = (pDice(softmax z, ŷ) + pDice(softmax z', ŷ)) / 2

Departures: the official gap takes raw features for log-probabilities and is NaN with negative ones; here it is KL(q_k ‖ q_i)
of softmaxes over the channels, or the mean squared difference, either cut off, since the term is maximised. The auxiliary
decoder is not merged (officially it was, and lost what the server mixed). Rows of p_D of other sites do not move here,
officially weight decay shrinks them. m comes from the site's generator (officially a global one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from clients.merging import MergingClient, MergingParams
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.losses.partial import labelled_pixels, partial_cross_entropy, partial_dice_loss
from fedmed.models.output import Output
from fedmed.models.prompt_unet import AUX_LOGITS, FUSED, NO_PLANE, PLANES, PromptUNet

KIND = "annotation_kind"  # extra of a batch: how its items were annotated, a place in `PLANES` or -1
# Kinds of annotation that have no plane of their own but are like one that has (official code).
_LIKE = {"noisy_scribble": "scribble", "scribble_noisy": "scribble", "box": "block", "keypoint": "point"}


@dataclass(frozen=True)
class PromptedDecodersParams(MergingParams):
    """Constants of the objective, and those of the merge."""

    alpha: float = 0.1  # α ≥ 0, weight of L_uni (published command; default of the official code: 0.5)
    beta: float = 0.5  # β ≥ 0, weight of L_pls (published command and official code)
    uni: str = "softmax"  # gap in L_uni: softmax, a divergence over the channels | mse (both ours, see Departures)
    uni_limit: float = 5.0  # > 0, most that one site's gap counts (ours)
    pls_rampup_rounds: int = 0  # ≥ 0, β rises linearly over these first rounds (ours); 0: β from the start (official)
    keep_drawn: bool = False  # the annotation replaces pseudo-labels where there is any (ours; official: false)

    def __post_init__(self) -> None:
        super().__post_init__()
        finite = all(0 <= weight < float("inf") for weight in (self.alpha, self.beta))
        if not (finite and self.uni_limit > 0 and self.pls_rampup_rounds >= 0):
            raise ValueError(
                "finite alpha, beta >= 0, uni_limit > 0 and pls_rampup_rounds >= 0 expected, got "
                f"{self.alpha}, {self.beta}, {self.uni_limit} and {self.pls_rampup_rounds}"
            )
        if self.uni not in _GAPS:
            raise ValueError(f"uni: one of {', '.join(_GAPS)} expected, got {self.uni!r}")


def softmax_gap(own: Tensor, others: Tensor) -> Tensor:
    """KL(q_k ‖ q_i) of softmaxes over the channels, mean over items and positions. (B, D, h, w), (S, B, D, h, w) to (S,) ≥ 0."""
    log_own, log_others = own.log_softmax(dim=1), others.log_softmax(dim=2)
    return (log_others.exp() * (log_others - log_own)).sum(dim=2).mean(dim=(1, 2, 3))


def squared_gap(own: Tensor, others: Tensor) -> Tensor:
    """Mean of (F_i - F_k)². (B, D, h, w), (S, B, D, h, w) to (S,) ≥ 0."""
    return (own - others).square().mean(dim=(1, 2, 3, 4))


_GAPS = {"softmax": softmax_gap, "mse": squared_gap}


def universal_term(own: Tensor, others: Tensor, gap: str = "softmax", limit: float = 5.0) -> Tensor:
    """L_uni = - mean over the S other sites of min(gap, limit), in [-limit, 0]; 0 for S = 0. Shapes as in `softmax_gap`."""
    if len(others) == 0:
        return own.new_zeros(())
    return -_GAPS[gap](own, others.detach()).clamp_max(limit).mean()


def pseudo_labels(prob: Tensor, aux_prob: Tensor, share: float) -> Tensor:
    """ŷ = argmax of m p + (1 - m) p', the lowest class of equal ones. (B, C, H, W) each, m in [0, 1]. Out: (B, H, W) int64."""
    return (share * prob.detach() + (1.0 - share) * aux_prob.detach()).argmax(dim=1)


def pseudo_label_loss(prob: Tensor, aux_prob: Tensor, labels: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """L_pls: mean over both decoders of the soft Dice loss with ŷ, all pixels and classes. (B, C, H, W) twice, (B, H, W)."""
    # The official mask broadcasts over the batch; as ŷ leaves no pixel out, that does no more than divide `smooth` by B.
    return (partial_dice_loss(prob, labels, smooth=smooth) + partial_dice_loss(aux_prob, labels, smooth=smooth)) / 2


def rampup(round_number: int, rounds: int) -> float:
    """min(round / rounds, 1) for rounds 1, 2, ...; 1 if `rounds` is 0."""
    return min(round_number / rounds, 1.0) if rounds else 1.0


def kind_index(label_kind: str) -> int:
    """The place in `PLANES` of a kind of annotation; -1 for full masks, image tags and everything unknown."""
    name = _LIKE.get(label_kind, label_kind)
    return PLANES.index(name) if name in PLANES else NO_PLANE


class PromptedDecoders(MergingClient):
    """Trains a `PromptUNet` on what is drawn; the main decoder with its MLP is merged, the auxiliary one comes mixed.

    A step makes F once more for each other site, from one pass of the encoder. Kept at the site: as `MergingClient`.
    """

    Params: ClassVar[type] = PromptedDecodersParams
    merge_prefixes: ClassVar[tuple[str, ...]] = ("decoder", "mlp")

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Merge; keep the prompts of other sites as they came; begin the draws of m."""
        super().begin_round(config, extras)
        self.shares = self.rng("pseudo-labels")
        self.beta = self.params.beta * rampup(self.round, self.params.pls_rampup_rounds)
        sites = torch.arange(min(self.num_sites, self.network.num_sites))
        self.others = sites[sites != self.site_index] if self.site_index >= 0 else sites[:0]
        self.rows = self.network.distribution_prompts.detach().clone()

    @property
    def network(self) -> PromptUNet:
        """The model as what `_check` has found it to be."""
        return cast(PromptUNet, self.model)

    def _check(self) -> None:
        """Refuse what the method cannot read. Raises `UserError`."""
        if not isinstance(self.model, PromptUNet):
            raise UserError(
                f"client 'fedlppa' needs a model with prompts and an auxiliary decoder, not {self.config.model.name}; "
                "set model.name=prompt_unet"
            )
        super()._check()

    def forward(self, batch: Batch) -> Output:
        """One pass, with the site's place in the federation and its kind of annotation."""
        kind = kind_index(self.data.label_kind)
        batch.extras = {**batch.extras, KIND: torch.full((len(batch),), kind, device=batch.images.device)}
        return super().forward(batch)

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The terms pce, uni (weighted by α) and pls (weighted by β); one of weight 0 is left out."""
        assert output.aux is not None
        terms = {"pce": partial_cross_entropy(output.logits, batch.targets, self.train_set.ignore_value)}
        if self.params.alpha > 0:
            with self.autocast():
                others = self.network.others_fused(output.aux, self.others, batch.extras[KIND])
            own = output.aux[FUSED].float()
            terms["uni"] = self.params.alpha * universal_term(
                own, others.float(), self.params.uni, self.params.uni_limit
            )
        if self.beta > 0:
            terms["pls"] = self.beta * self._pseudo_label_term(output, batch)
        return terms

    def _pseudo_label_term(self, output: Output, batch: Batch) -> Tensor:
        assert output.aux is not None
        prob, aux_prob = output.logits.softmax(dim=1), output.aux[AUX_LOGITS].float().softmax(dim=1)
        labels = pseudo_labels(prob, aux_prob, float(torch.rand((), generator=self.shares)))
        if self.params.keep_drawn:
            drawn = labelled_pixels(batch.targets, prob.shape[1], self.train_set.ignore_value)
            labels = torch.where(drawn, batch.targets, labels)
        return pseudo_label_loss(prob, aux_prob, labels)

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step, after which only the site's own row of p_D has moved."""
        terms = super().train_step(batch, step)
        if self.site_index >= 0:
            with torch.no_grad():
                prompts = self.network.distribution_prompts
                self.rows[self.site_index] = prompts[self.site_index]
                prompts.copy_(self.rows)
        return terms
