"""FedA3I: weigh the sites by the quality of their contours, in deep layers more than in shallow ones.

Source: Wu et al., "FedA3I: Annotation Quality-Aware Aggregation for Federated Medical Image Segmentation against
Heterogeneous Annotation Noise", AAAI 2024, arXiv 2312.12838, and its official code.
The local half is `clients/quality_features.py`.
Symbols: K sites, F foreground classes, G depth groups, n_k → num_examples, p_k = n_k / Σ n, f_k → features (2F: inner
and outer loss by class), s_k → score, u_k → quality, λ → expansion_mass, α_g → alpha, T₁ → warmup_rounds.

Departures from the official code, which raises or divides by zero in these cases (rule R1): sites without features get
u_k = p_k; no usable split of the sites gives u = p; a group without spread shares its mass evenly. Scores read all
classes (official: the first). Layers are matched on whole name components, not on substrings. Counters: maximum.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedmed.federation.state import RunningMean, mix
from fedmed.federation.strategy import Strategy, Update

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EXPANSION, SHRINKAGE, NO_GROUP = 1, 0, -1
GROUP_NAMES = {EXPANSION: "expansion", SHRINKAGE: "shrinkage", NO_GROUP: "none"}
NO_SPREAD = 1e-12  # features or scores that spread less than this do not tell sites apart (rule R1)
FEW_SITES = 3  # a smaller group is one or two sites: min–max gives one of them the whole mass of the group


@dataclass(frozen=True)
class FedA3IParams:
    """Constants of the method; defaults are the official code's unless marked."""

    warmup_rounds: int = 10  # T₁ ≥ 0, rounds of FedAvg before the features are asked for
    expansion_mass: float = 0.5  # λ in [0, 1], share of the quality weight that goes to the expansion group
    alpha_weight: float = 1.0  # a of α_g = a·(g/(G−1))^γ + b; b and a + b in [0, 1], else a weight could be negative
    alpha_power: float = 1.0  # γ ≥ 0
    alpha_bias: float = 0.0  # b
    covariance: str = "full"  # full | diag; diag is steadier with few sites (our option)

    def __post_init__(self) -> None:
        ends = (self.alpha_bias, self.alpha_weight + self.alpha_bias)  # α of the first and of the last group
        in_range = self.warmup_rounds >= 0 and 0 <= self.expansion_mass <= 1 and self.alpha_power >= 0
        if not in_range or min(ends) < 0 or max(ends) > 1 or self.covariance not in ("full", "diag"):
            raise ValueError(f"a value is outside its range, see strategies/quality_layerwise.py: {self}")


@dataclass(frozen=True)
class FedA3IState:
    """What survives a round: the one estimate of round T₁ + 1, by site."""

    quality: dict[str, float] = field(default_factory=dict)  # u_k, sums to 1; empty: not estimated yet
    group: dict[str, int] = field(default_factory=dict)  # 1 expansion, 0 shrinkage, −1 none
    features: dict[str, list[float]] = field(default_factory=dict)  # f_k, NaN = undefined
    total_examples: float = 0.0  # Σ n over the sites of the estimate, for the u of sites that come later


@dataclass(frozen=True)
class Quality:
    """u (K,), Σ u = 1, and the group (K,) of each site: 1 expansion, 0 shrinkage, −1 none."""

    weights: Floats
    group: Ints


def shares(num_examples: Floats) -> Floats:
    """Quantity weights p_k = n_k / Σ n. In and out: (K,). Σ n = 0: equal shares."""
    total = num_examples.sum()
    return num_examples / total if total > 0 else np.full(len(num_examples), 1.0 / max(len(num_examples), 1))


def expansion_group(features: Floats, covariance: str = "full") -> npt.NDArray[np.bool_] | None:
    """Split the sites by a two-component Gaussian mixture; the one with the larger Σ_c m[2c] − Σ_c m[2c+1] expands.
    An oversized mask calls background foreground, so the inner loss is large. In: (K, 2F) finite, K ≥ 2. Out: (K,),
    True = expansion; tie: the second component. None when the mixture cannot be fitted (overflow).
    """
    from sklearn import exceptions, mixture  # a heavy import, needed once in a run and at the server only

    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            model = mixture.GaussianMixture(2, covariance_type=covariance, random_state=0).fit(features)
            component = model.predict(features)
        except (ValueError, np.linalg.LinAlgError):
            return None
    inner_minus_outer = model.means_[:, 0::2].sum(axis=1) - model.means_[:, 1::2].sum(axis=1)
    if not np.isfinite(inner_minus_outer).all():
        return None
    return np.asarray(component == (0 if inner_minus_outer[0] > inner_minus_outer[1] else 1))


def noise_score(features: Floats, expands: npt.NDArray[np.bool_]) -> Floats:
    """Noise of a site: s_k = ± Σ_c (f_k[2c] − f_k[2c+1]), + for expansion and − for shrinkage. (K, 2F), (K,) → (K,)."""
    difference: Floats = features[:, 0::2].sum(axis=1) - features[:, 1::2].sum(axis=1)
    return np.where(expands, difference, -difference)


def shares_by_score(score: Floats) -> Floats:
    """Share of each site in its group: t_k / Σ t, t_k = 1 − (s_k − min s) / (max s − min s). In and out: (K_g,),
    K_g ≥ 1; the noisiest site gets 0. Equal scores (range ≤ 1e-12): t = 1 for all.
    """
    spread = score.max() - score.min()
    cleanness = 1.0 - (score - score.min()) / spread if spread > NO_SPREAD else np.ones_like(score)
    return np.asarray(cleanness / cleanness.sum())


def quality_weights(
    features: Floats, num_examples: Floats, expansion_mass: float = 0.5, covariance: str = "full"
) -> Quality:
    """Quality weights u from the noise features (rule R1).

    In: f (K, 2F) columns inner, outer by class, NaN = undefined; n (K,). Inside each group u = mass · t / Σ t, mass λ
    for expansion, 1 − λ for shrinkage, 1 for an only group. Sites with an undefined feature: u_k = p_k, the others
    share the rest. Fewer than two valid sites, equal features, or no mixture: u = p, no groups.
    """
    features = np.asarray(features, dtype=np.float64)
    quantity = shares(np.asarray(num_examples, dtype=np.float64))
    group = np.full(len(features), NO_GROUP, dtype=np.int64)
    valid = np.isfinite(features).all(axis=1)
    known = features[valid]
    expands = None
    if len(known) >= 2 and (np.ptp(known, axis=0) > NO_SPREAD).any():
        expands = expansion_group(known, covariance)
    if expands is None:
        return Quality(quantity, group)
    score = noise_score(known, expands)
    weights = np.zeros(len(known))
    for members, mass in ((expands, expansion_mass), (~expands, 1.0 - expansion_mass)):
        if members.any():
            weights[members] = (1.0 if members.all() else mass) * shares_by_score(score[members])
    quality = quantity.copy()
    quality[valid] = weights * (1.0 - quantity[~valid].sum())
    group[valid] = np.where(expands, EXPANSION, SHRINKAGE)
    return Quality(quality, group)


def alpha_by_group(num_groups: int, weight: float = 1.0, power: float = 1.0, bias: float = 0.0) -> Floats:
    """Share of the quality weights by depth: α_g = a·(g/(G−1))^γ + b, (G,), 0 = first layers. G = 1: position 1."""
    position = np.arange(num_groups) / (num_groups - 1) if num_groups > 1 else np.ones(num_groups)
    return np.asarray(weight * position**power + bias, dtype=np.float64)


def layer_weights(quality: Floats, num_examples: Floats, alpha: Floats) -> Floats:
    """Weights that `aggregate_layerwise` amounts to: ω_{g,k} = α_g u_k + (1 − α_g) p_k, each Σ = 1. (G, K)."""
    quantity = shares(np.asarray(num_examples, dtype=np.float64))
    total = quality.sum()
    u = quality / total if total > 0 else quantity
    return np.outer(alpha, u) + np.outer(1.0 - alpha, quantity)


def aggregate_layerwise(
    states: Iterable[tuple[float, float, Mapping[str, Tensor]]], alpha_by_entry: Mapping[str, float]
) -> dict[str, Tensor] | None:
    """Layer-wise mean by two running sums: α·A + (1 − α)·B, A = Σ u_k W_k / Σ u_k, B = Σ n_k W_k / Σ n_k.

    In: (u_k, n_k, state) of the sites that replied, read once; α of every entry. Σ u = 0: A = B. Counters: maximum.
    Out: the new state, None when nobody has weight. Memory: two states and the one being read.
    """
    by_quality, by_quantity = RunningMean(), RunningMean()
    for quality, num_examples, state in states:
        by_quality.add(state, quality)
        by_quantity.add(state, num_examples)
    quantity_mean = by_quantity.result()
    quality_mean = by_quality.result() or quantity_mean
    if quality_mean is None or quantity_mean is None:
        return quality_mean
    return mix(quality_mean, quantity_mean, alpha_by_entry)


def feature_rows(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Read `loss_in_<c>`, `loss_out_<c>` of every site into rows of equal length; what a site left out is NaN."""
    classes = [int(name.rpartition("_")[2]) for row in metrics.values() for name in row if name.startswith("loss_in_")]
    columns = [f"loss_{side}_{c}" for c in range(max(classes, default=0) + 1) for side in ("in", "out")]
    return {site: [float(row.get(column, np.nan)) for column in columns] for site, row in metrics.items()}


class FedA3I(Strategy):
    """FedAvg for T₁ rounds; u from the features that come in round T₁ + 1 (holds all K replies); then two running sums.
    Note `believed_noisy`: the sites that the estimate trusts less than their size would (u_k < p_k).
    """

    Params = FedA3IParams
    State = FedA3IState
    requires: ClassVar[tuple[str, ...]] = ("loss_in_*", "loss_out_*")
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Ask for the features in round T₁ + 1, unless they are known."""
        return {}, {"estimate_noise": round == self.params.warmup_rounds + 1 and not self.state.quality}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """FedAvg in the warm-up, afterwards the layer-wise mean."""
        depth = self.layout.group_of("depth")  # here, so that a model without groups fails in round 1, not after T₁
        if round <= self.params.warmup_rounds:
            return super().aggregate(round, global_state, updates)
        if not self.state.quality:
            updates = list(updates)
            self._estimate(round, updates)
        a, power, b = self.params.alpha_weight, self.params.alpha_power, self.params.alpha_bias
        alpha = alpha_by_group(self.layout.num_groups("depth"), a, power, b)
        quality, num_examples = [], []  # of the sites that replied, for the note

        def weighted() -> Iterator[tuple[float, float, dict[str, Tensor]]]:
            for update in updates:
                n = float(update.num_examples)
                quality.append(self.state.quality.get(update.site, n / max(self.state.total_examples, n, 1.0)))
                num_examples.append(n)
                yield quality[-1], n, update.arrays

        result = aggregate_layerwise(weighted(), {name: float(alpha[group]) for name, group in depth.items()})
        weights = layer_weights(np.array(quality), np.array(num_examples), alpha)
        self.note("largest_weight", float(weights.max(initial=0.0)))
        return global_state if result is None else result

    def _estimate(self, round: int, received: Sequence[Update]) -> None:
        """Set u by site from the features of this round; a site that is absent now counts by its size, for good."""
        size = {site.site: float(site.num_train) for site in self.sites}
        size |= {update.site: float(update.num_examples) for update in received}
        sent = {update.site: update.metrics for update in received}
        features = feature_rows({site: sent.get(site, {}) for site in sorted(size)})
        table, n = np.array(list(features.values())), np.array([size[site] for site in features])
        found = quality_weights(table, n, self.params.expansion_mass, self.params.covariance)
        quality = dict(zip(features, found.weights.tolist(), strict=True))
        group = dict(zip(features, found.group.tolist(), strict=True))
        self.state = replace(self.state, quality=quality, group=group, features=features, total_examples=float(n.sum()))
        sizes = {name: int((found.group == label).sum()) for label, name in GROUP_NAMES.items()}
        self.note("quality", quality)
        self.note("groups", sizes)
        self.note("believed_noisy", [site for site, p in zip(features, shares(n), strict=True) if quality[site] < p])
        if min(sizes["expansion"], sizes["shrinkage"]) < FEW_SITES:
            largest = max(found.weights)
            self.log.warning("round %d: groups %s, largest u %.2f: do not lean on so few", round, sizes, largest)
