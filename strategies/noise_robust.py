"""FedNoRo: find the sites with noisy labels once, then trust those less that are far from the clean ones.

Source: Wu et al., "FedNoRo: Towards Noise-Robust Federated Learning by Addressing Class Imbalance and Label Noise
Heterogeneity", IJCAI 2023, arXiv 2305.05230, and its official code. The local half is `clients/noise_robust.py`.
Symbols: K sites, C classes, n_k → num_examples, L_{k,c} → class_loss, M → indicator, S_n / S_c → noisy / clean sites,
D → distance, D̂ → normalised, ω → weights, T₁ → warmup_rounds, λ_t → kd_weight; t counts rounds from 0 (t = round − 1).

Departures from the official code, which divides by zero or raises in these cases:
R1, identification: rows without a finite value are left out, flat classes dropped, a vote against all is void;
R2, aggregation: non-finite states are dropped; without a noisy or without a clean site the weights are FedAvg's.
Distances are summed in float64 (official: float32). Counters: maximum. A site that gave no answer is clean for good.
"""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmed.federation.state import first_non_finite, weighted_mean
from fedmed.federation.strategy import Answer, Query, Strategy, Update

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
States = Sequence[Mapping[str, Tensor]]
Names = Iterable[str] | None

CONSTANT_RANGE = 1e-12  # a class whose losses spread less than this says nothing about who is noisy (rule R1)
FEW_SITES = 3  # a smaller group is one or two sites, not a pattern


@dataclass(frozen=True)
class FedNoRoParams:
    """Constants of the method; defaults are the official code's unless marked."""

    warmup_rounds: int = 10  # T₁ ≥ 0, rounds of stage 1
    ramp_begin: float = 10.0  # t ≥ 0 at which λ starts to rise
    ramp_end: float = 49.0  # t ≥ ramp_begin from which λ = kd_cap
    kd_cap: float = 0.8  # a in [0, 1], the largest λ
    num_votes: int = 9  # ≥ 1 mixtures, fitted with seeds 0, 1, …
    covariance: str = "full"  # full | diag; diag is steadier when K is near 2C (our option)
    distance: str = "state"  # state: float entries with norm statistics | parameters: without buffers (our option)

    def __post_init__(self) -> None:
        counts = self.warmup_rounds >= 0 and self.num_votes >= 1
        ramp = 0 <= self.ramp_begin <= self.ramp_end and 0 <= self.kd_cap <= 1
        if (
            not (counts and ramp)
            or self.covariance not in ("full", "diag")
            or self.distance not in ("state", "parameters")
        ):
            raise ValueError(f"a value is outside its range, see strategies/noise_robust.py: {self}")


@dataclass(frozen=True)
class FedNoRoState:
    """What survives a round: the role of each site, and the losses it was judged by."""

    roles: dict[str, str] = field(default_factory=dict)  # site → "clean" | "noisy"; empty: not identified yet
    class_loss: dict[str, list[float]] = field(default_factory=dict)  # site → (C,), NaN = class absent


@dataclass(frozen=True)
class Identification:
    """Every step: (K, C) floats, NaN where a cell was not used; votes (num_votes, K); masks (K,)."""

    filled: Floats
    indicator: Floats
    votes: Bools
    used: Bools
    is_noisy: Bools


@dataclass(frozen=True)
class DaAgg:
    """D, D̂ and ω of one aggregation, each (K,); 0 for dropped sites. Σω = 1, or 0 when nobody is left."""

    distance: Floats
    normalised: Floats
    weights: Floats


def fill_absent(class_loss: Floats, used: Bools) -> Floats:
    """Identification (i): fill absent classes with the column minimum over the used sites (a site that lacks classes
    looks cleaner by this, as published). In: (K, C) with NaN, (K,). Out: (K, C), NaN in rows not used, columns unknown.
    """
    absent = np.isnan(class_loss)
    lowest = np.where(absent | ~used[:, None], np.inf, class_loss).min(axis=0)
    return np.where(used[:, None] & np.isfinite(lowest), np.where(absent, lowest, class_loss), np.nan)


def normalise_columns(filled: Floats) -> Floats:
    """Identification (ii): min–max each class, M_{k,c} = (L_{k,c} − min_k L) / (max_k L − min_k L). (K, C) → (K, C);
    columns with a range ≤ 1e-12, and what was NaN, come out NaN.
    """
    known = np.where(np.isnan(filled).all(axis=0), 0.0, filled)
    lowest, highest = np.fmin.reduce(known, axis=0), np.fmax.reduce(known, axis=0)
    usable = highest - lowest > CONSTANT_RANGE
    return np.where(usable, (filled - lowest) / np.where(usable, highest - lowest, 1.0), np.nan)


def mixture_votes(indicator: Floats, num_votes: int = 9, covariance: str = "full") -> Bools:
    """Identification (iii): two-component Gaussian mixtures, seeds 0, 1, …; the one with the larger mean sum is noisy.
    In: (K', C') finite, K' ≥ 2, C' ≥ 1. Out: (num_votes, K'), True = noisy.
    """
    from sklearn import exceptions, mixture  # a heavy import, needed once in a run and at the server only

    votes = np.zeros((num_votes, len(indicator)), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # equal rows: the vote is void
        for seed in range(num_votes):
            model = mixture.GaussianMixture(2, covariance_type=covariance, random_state=seed).fit(indicator)
            votes[seed] = model.predict(indicator) == int(np.argmax(model.means_.sum(axis=1)))
    return votes


def majority_set(votes: Bools) -> Bools:
    """Identification (iv): the set named most often as a whole, the first of equals. In: (votes, K). Out: (K,)."""
    return np.array(Counter(map(tuple, votes.tolist())).most_common(1)[0][0], dtype=bool)


def identify(class_loss: Floats, num_votes: int = 9, covariance: str = "full") -> Identification:
    """Find the noisy sites from their mean losses by class (i–iv under rule R1).
    In: L (K, C), NaN = class absent, +inf = present but the mean is not finite. Rows all NaN or with ±inf are not
    judged, so not noisy. Fewer than two sites to judge, no class with spread, or everybody noisy: nobody is.
    """
    raw = np.asarray(class_loss, dtype=np.float64)
    used: Bools = np.asarray(~np.isnan(raw).all(axis=1) & ~np.isinf(raw).any(axis=1))
    filled = fill_absent(raw, used)
    indicator = normalise_columns(filled)
    classes = ~np.isnan(indicator[used]).any(axis=0)
    votes = np.zeros((num_votes, len(raw)), dtype=bool)
    if used.sum() >= 2 and classes.any():
        votes[:, used] = mixture_votes(indicator[np.ix_(used, classes)], num_votes, covariance)
    is_noisy = majority_set(votes)
    return Identification(filled, indicator, votes, used, np.asarray(is_noisy & ~is_noisy[used].all()))


def kd_weight(t: float, begin: float = 10.0, end: float = 49.0, cap: float = 0.8) -> float:
    """Ramp of the distillation weight: λ_t = a·exp(−5φ²), φ = 1 − (clip(t, begin, end) − begin)/(end − begin), in
    [a·e⁻⁵, a]. begin = end: a·e⁻⁵ before, a from `end` on (the official code divides by zero).
    """
    rise = (min(max(t, begin), end) - begin) / (end - begin) if end > begin else float(t >= end)
    return float(cap * np.exp(-5.0 * (1.0 - rise) ** 2))


def distance_matrix(rows: States, columns: States, names: Names = None) -> Floats:
    """Distances between states: dist(i, j) = Σ_tensors ‖W_i − W_j‖₂, a sum of norms by entry.
    In: R ≥ 1 and Q ≥ 1 states; `names`: the entries to read (None: all); integers are skipped. Differences and sums
    in float64. Out: (R, Q). Extra memory: R + Q times the largest entry.
    """
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for name in rows[0] if names is None else names:
        if rows[0][name].is_floating_point():
            left, right = (torch.stack([state[name].double().flatten() for state in side]) for side in (rows, columns))
            # the matrix-product form of cdist would lose the small differences between trained models
            total += torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    return np.asarray(total.numpy())


def distance_to_clean(states: States, is_noisy: Bools, kept: Bools, names: Names = None) -> Floats:
    """Distance of each noisy site to the nearest clean one: D_i = min_{j ∈ S_c} dist(i, j). In: K states, masks (K,).
    Out: (K,); 0 for clean and dropped sites, all 0 when no noisy or no clean site is kept.
    """
    distance = np.zeros(len(states))
    noisy, clean = np.flatnonzero(is_noisy & kept).tolist(), np.flatnonzero(~is_noisy & kept).tolist()
    if noisy and clean:
        distance[noisy] = distance_matrix([states[i] for i in noisy], [states[j] for j in clean], names).min(axis=1)
    return distance


def daagg_weights(distance: Floats, num_examples: Floats) -> DaAgg:
    """Weights ω_k ∝ n_k·exp(−D̂_k), D̂ = D / max D. In: (K,), (K,), both ≥ 0. max D = 0: D̂ = 0. Σ n = 0: ω = 0."""
    farthest = distance.max(initial=0.0)
    normalised = distance / farthest if farthest > 0 else np.zeros_like(distance)
    weights = num_examples * np.exp(-normalised)
    total = weights.sum()
    return DaAgg(distance, normalised, weights / total if total > 0 else np.zeros_like(weights))


def daagg(
    states: States, num_examples: Sequence[float], is_noisy: Sequence[bool], names: Names = None
) -> tuple[dict[str, Tensor] | None, DaAgg]:
    """Average the states with these weights, W = Σ ω_k W_k (rule R2).
    In: K states, n (K,), flags (K,); `names`: the entries that distances read. Out: the mean (integers: maximum), None
    when nobody is left; and the weights. A state that holds a non-finite value is left out.
    """
    kept = np.array([first_non_finite(state) is None for state in states], dtype=bool)
    distance = distance_to_clean(states, np.asarray(is_noisy, dtype=bool), kept, names)
    result = daagg_weights(distance, np.where(kept, np.asarray(num_examples, dtype=np.float64), 0.0))
    return weighted_mean(zip(result.weights.tolist(), states, strict=True)), result


class FedNoRo(Strategy):
    """FedAvg for T₁ rounds (running sum), one query for the class losses, then DaAgg (holds all K replies)."""

    Params = FedNoRoParams
    State = FedNoRoState
    requires: ClassVar[tuple[str, ...]] = ("class_loss",)
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def queries(self, round: int) -> list[Query]:
        """Ask for the class losses once, before the first round of stage 2."""
        return [Query("class_losses", {})] if round > self.params.warmup_rounds and not self.state.roles else []

    def on_query(self, round: int, name: str, answers: list[Answer]) -> None:
        """Identify the noisy sites; a known site without an answer is clean. Notes what the result rests on."""
        rows = {a.site: np.asarray(a.metrics.get("class_loss", ()), dtype=np.float64) for a in answers}
        num_classes = statistics.mode([row.size for row in rows.values()] or [0])
        rows = {site: row for site, row in rows.items() if row.size == num_classes > 0}
        believed: list[str] = []
        if rows:
            found = identify(np.stack(list(rows.values())), self.params.num_votes, self.params.covariance)
            believed = sorted(site for site, noisy in zip(rows, found.is_noisy, strict=True) if noisy)
            self.note("left_out", [site for site, used in zip(rows, found.used, strict=True) if not used])
            self.note("filled_classes", {site: np.flatnonzero(np.isnan(row)).tolist() for site, row in rows.items()})
        roles = {site: "noisy" if site in believed else "clean" for site in [s.site for s in self.sites] + list(rows)}
        sizes = dict(Counter(roles.values()))
        self.note("believed_noisy", believed)
        self.note("groups", sizes)
        if not rows or (believed and min(sizes.values()) < FEW_SITES):
            self.log.warning("round %d: groups %s from %d answers: do not lean on this split", round, sizes, len(rows))
        self.state = replace(self.state, roles=roles, class_loss={site: row.tolist() for site, row in rows.items()})

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tell a site its stage, its role and the weight of the distillation term (0 for clean sites)."""
        params, role = self.params, self.state.roles.get(site, "clean")
        weight = kd_weight(round - 1, params.ramp_begin, params.ramp_end, params.kd_cap) if role == "noisy" else 0.0
        return {}, {"stage": 1 if round <= params.warmup_rounds else 2, "role": role, "kd_weight": weight}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Stage 1: FedAvg. Stage 2: DaAgg over this round's replies."""
        if round <= self.params.warmup_rounds:
            return super().aggregate(round, global_state, updates)
        received = list(updates)
        entries, every = self.layout.entries, self.params.distance == "state"
        names = [name for name in self.layout.exchanged if every or entries[name].kind == "parameter"]
        noisy = [self.state.roles.get(update.site) == "noisy" for update in received]
        mean, used = daagg([u.arrays for u in received], [u.num_examples for u in received], noisy, names)
        self.note_weights({u.site: w for u, w in zip(received, used.weights.tolist(), strict=True)})
        return global_state if mean is None else mean
