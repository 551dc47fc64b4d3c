"""FedMix: each site annotates in its own way; weights follow what a site could use and how much it still has to learn.

Source: "FedMix: Mixed Supervised Federated Learning for Medical Image Segmentation", IEEE TMI 2023, arXiv 2205.01840, and
its official code. The local half is `clients/cross_pseudo.py`.
Symbols: K sites, n_k → num_selected (images with a mask or a pseudo-label that was taken), l_k → loss (mean training loss
of network 1 in the round), λ → lambda_, β → beta, E → eligible sites, w_k → weights.
c_k = n_k / Σ_E n + λ l_k^β / Σ_E l^β, w_k = c_k / Σ_E c, E = {k: n_k > 0 and l_k finite}; both networks get the same w.

Departures: the official code has no E: there a site without any selected image still gets a loss term, from labels of
earlier rounds or from its hidden masks. Nobody in E: both networks stay. Σ l^β = 0: w_k = n_k / Σ n. Counters take the
maximum (official: average, truncated).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedmed.federation.state import RunningMean, State, mix
from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import Floats, reported

SMALLEST, LARGEST = 1e-30, 1e30  # of l^β, so that float32 sums of weighted models neither vanish nor overflow


@dataclass(frozen=True)
class FedMixParams:
    """Constants of the method; defaults are the official code's for breast ultrasound unless marked."""

    lambda_: float = 10.0  # λ ≥ 0, strength of the loss term (skin 10, OCT 2); 0: FedAvg over the selected images
    beta: float = 1.5  # β ≥ 0, sharpness of the loss term (skin and OCT 3); 0: every site the same
    threshold: float = 0.9  # in [0, 1], least Dice of the two networks for an image to be taken
    box_dice_min: float = 0.5  # in [0, 1], least Dice of network 1 and the box, at sites with boxes
    reject_empty: bool = True  # at sites with tags: refuse what lacks a tagged class (our option; false: official)
    reject_empty_unlabelled: bool = False  # at sites without annotation: refuse what is empty (our option)

    def __post_init__(self) -> None:
        finite = 0 <= self.lambda_ < math.inf and 0 <= self.beta < math.inf
        if not (finite and 0 <= self.threshold <= 1 and 0 <= self.box_dice_min <= 1):
            raise ValueError(
                f"finite lambda_ >= 0 and beta >= 0, threshold and box_dice_min in [0, 1] expected, got {self}"
            )


def share(values: Floats) -> Floats:
    """Values over their sum, v_k / Σ v. (K,) → (K,); NaN where the sum is 0."""
    total = values.sum()
    return values / total if total != 0 else np.full(len(values), math.nan)


def combined(data_share: Floats, loss_share: Floats, lambda_: float) -> Floats:
    """c_k / Σ c with c_k = data share + λ · loss share; with two shares that sum to 1, Σ c = 1 + λ. (K,), (K,) → (K,)."""
    return share(data_share + lambda_ * loss_share)


def loss_power(loss: float, beta: float) -> float:
    """l^β. A loss below 0 (rounding) counts as 0, a power below 1e-30 too; NaN for what cannot be a Dice loss: not
    finite, or with a power above 1e30.
    """
    if not math.isfinite(loss):
        return math.nan
    try:
        power = max(loss, 0.0) ** beta
    except OverflowError:
        return math.nan
    return math.nan if power > LARGEST else power if power >= SMALLEST else 0.0


def aggregation_weights(num_selected: Floats, loss: Floats, lambda_: float, beta: float) -> Floats:
    """w_k over the eligible sites, 0 for the others. (K,), (K,) → (K,), Σ w = 1; nobody eligible: all 0."""
    power = np.array([loss_power(value, beta) for value in loss.tolist()], dtype=np.float64)
    eligible = (num_selected > 0) & np.isfinite(power)
    weights = np.zeros(len(loss))
    if eligible.any():
        data, mass = share(num_selected[eligible]), power[eligible]
        weights[eligible] = combined(data, share(mass), lambda_) if mass.sum() > 0 else data
    return weights


class TwoSums:
    """Σ w_k θ_k from two running means, one weighted by n_k and one by l_k^β; no reply is held. Memory: two states."""

    def __init__(self, lambda_: float, beta: float) -> None:
        self._lambda, self._beta = lambda_, beta
        self._by_data, self._by_loss = RunningMean(), RunningMean()

    def add(self, state: Mapping[str, Tensor], num_selected: float, loss: float) -> None:
        """Add one site; one that is not eligible has no part."""
        power = loss_power(loss, self._beta)
        if num_selected > 0 and math.isfinite(power):
            self._by_data.add(state, num_selected)
            self._by_loss.add(state, power if self._lambda > 0 else 0.0)

    def result(self) -> State | None:
        """(by data + λ · by loss) / (1 + λ); by data alone where Σ l^β = 0; None if nobody was eligible. Ends the sums."""
        by_data, by_loss = self._by_data.result(), self._by_loss.result()
        if by_data is None or by_loss is None:
            return by_data
        common = {name: by_data[name] for name in by_loss}
        return {**by_data, **mix(common, by_loss, dict.fromkeys(common, 1.0 / (1.0 + self._lambda)))}


class FedMix(Strategy):
    """Weights by selected images and by the loss on them, for both networks alike. Two running sums, one reply in memory."""

    Params = FedMixParams
    requires: ClassVar[tuple[str, ...]] = ("num_selected", "num_total", "train_loss_net1")
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an image must meet to be taken, alike for all sites."""
        names = ("threshold", "box_dice_min", "reject_empty", "reject_empty_unlabelled")
        return {}, {name: getattr(self.params, name) for name in names}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Average by the two sums; without an eligible site both networks stay. Notes weights, losses and selections."""
        kinds = {site.label_kind for site in self.sites if not site.plain}
        if round == 1 and kinds and "mask" not in kinds:
            self.log.warning("no site has masks (%s): nothing holds the pseudo-labels near the truth", sorted(kinds))
        sums = TwoSums(self.params.lambda_, self.params.beta)
        sizes: dict[str, float] = {}
        losses: dict[str, float] = {}
        totals: dict[str, float] = {}
        for update in updates:
            sizes[update.site] = float(update.num_examples)
            losses[update.site] = reported(update, "train_loss_net1")
            totals[update.site] = reported(update, "num_total")
            sums.add(update.arrays, sizes[update.site], losses[update.site])
            del update
        number, loss = (np.array(list(values.values()), dtype=np.float64) for values in (sizes, losses))
        weights = aggregation_weights(number, loss, self.params.lambda_, self.params.beta)
        self.note_weights(dict(zip(sizes, weights.tolist(), strict=True)))
        self.note("train_loss_net1", losses)
        self.note("num_selected", sizes)
        self.note("num_total", totals)
        mean = sums.result()
        if mean is None:
            self.log.warning("round %d: no site had an image to learn from; both networks stay as they are", round)
            return global_state
        return {**global_state, **mean}
