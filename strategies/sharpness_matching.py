"""FedISM and FedISM+: more weight for sites where the model sits in a sharp minimum, so that it ends equally flat for all.

Source: Wu et al., "From Optimization to Generalization: Fair Federated Learning against Quality Shift via Inter-Client
Sharpness Matching", IJCAI 2024, arXiv 2404.17805; "Fair Federated Medical Image Classification Against Quality Shift
via Inter-Client Progressive State Matching", 2025, arXiv 2503.09587 (FedISM+: the radius grows over the rounds); and
their official code. The local half is `clients/sharpness_aware.py`.
Symbols: K sites, L_k → loss, L̂_k → perturbed_loss (of the received model and at distance ρ from it), S_k → sharpness,
a_k → share, q → q, β → beta, ω_k → weights, ρ → rho, p → power, T → rounds, t = round − 1.

Departures: the sites measure L and L̂ on their own data without augmentation and send two numbers (official: the server
reads all data, through the random training transform). The power is taken in log space: any finite q is defined.
Rule R1 where the official code gives NaN for everybody or raises: a site whose L or L̂ is not finite gets weight 0, and
the moving average runs over the sites that replied; so sites may be away or come later. Counters: maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedmed.federation.state import first_non_finite, weighted_mean
from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import reported

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
States = Sequence[Mapping[str, Tensor]]

FLOOR = 1e-10  # least sharpness of a valid site, and what is added to a share before the power (official code)
CEILING = 1e300  # most: a difference of two finite losses may overflow


@dataclass(frozen=True)
class FedISMParams:
    """Constants of FedISM; defaults are the official code's."""

    rho: float = 0.05  # ρ > 0, radius of the perturbation, in training and in the measurement
    q: float = 1.0  # q ≥ 0, how much sharper sites gain: 0 is uniform, ∞ the sharpest alone; published example: 2
    beta: float = 0.5  # β in [0, 1], weight of this round in the moving average

    def __post_init__(self) -> None:
        if not (0 < self.rho < np.inf and 0 <= self.q < np.inf and 0 <= self.beta <= 1):
            raise ValueError(f"rho > 0, q >= 0 (both finite) and 0 <= beta <= 1 expected, got {self}")


@dataclass(frozen=True)
class FedISMPlusParams(FedISMParams):
    """Constants of FedISM+."""

    power: float = 0.5  # p ≥ 0 of ρ_t = ρ·((t + 1)/T)^p; 0 is FedISM (official code: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power < np.inf:
            raise ValueError(f"power >= 0 and finite expected, got {self.power}")


@dataclass(frozen=True)
class FedISMState:
    """What survives a round."""

    weights: dict[str, float] = field(default_factory=dict)  # site → its last ω ≥ 0; a site never heard is not in it


def growing_radius(rho: float, round: int, rounds: int, power: float = 0.5) -> float:
    """Radius of FedISM+: ρ_t = ρ·((t + 1)/T)^p, round = t + 1 in 1…T. Reaches ρ in the last round. T < 1: ρ."""
    return float(rho * (round / rounds) ** power) if rounds >= 1 else rho


def sharpness(loss: Floats, perturbed_loss: Floats) -> Floats:
    """S_k = max(L̂_k − L_k, 1e-10), or 0 for a site that is not valid: L or L̂ is not finite. In and out: (K,)."""
    valid = np.isfinite(loss) & np.isfinite(perturbed_loss)
    with np.errstate(over="ignore"):
        rise = np.where(valid, perturbed_loss, 0.0) - np.where(valid, loss, 0.0)
    return np.where(valid, np.clip(rise, FLOOR, CEILING), 0.0)


def power_weights(sharpness: Floats, q: float = 1.0) -> Floats:
    """a_k ∝ (S_k / ΣS + 1e-10)^q over the valid sites (S > 0), taken in log space so that no power underflows for all.

    In: S (K,), 0 = not valid; q ≥ 0. Out: (K,), sum 1, 0 for sites that are not valid; all 0 when none is.
    """
    valid = sharpness > 0
    if not valid.any():
        return np.zeros(len(sharpness))
    scaled = sharpness[valid] / sharpness.max()  # so that the sum cannot overflow
    log_share = np.log(scaled / scaled.sum() + FLOOR)
    powered = np.exp(q * (log_share - log_share.max()))
    weights = np.zeros(len(sharpness))
    weights[valid] = powered / powered.sum()
    return weights


def moving_average(share: Floats, previous: Floats, valid: Bools, beta: float = 0.5) -> Floats:
    """ω = β·a + (1 − β)·history, history being the previous ω over the valid sites, made to sum to 1.

    In: a (K,), 0 where not valid; previous (K,), NaN = newcomer; (K,). A newcomer's history is its own a_k; the others
    share what newcomers leave of the sum. No previous weight on the valid sites: ω = a. Out: (K,), sum 1.
    """
    known = valid & ~np.isnan(previous)
    mass = previous[known].sum()
    if not mass > 0:
        return share
    left = max(1.0 - share[valid & ~known].sum(), 0.0)
    history = np.where(known, previous / mass * left, share)
    return np.asarray(beta * share + (1.0 - beta) * history)


def sharpness_weights(sharpness: Floats, q: float = 1.0, beta: float = 0.5, previous: Floats | None = None) -> Floats:
    """Weights ω of a round (rule R1). In: S (K,), 0 = not valid; previous ω (K,), NaN = newcomer, None: all are. Out: (K,).

    Nobody valid: the previous weights (newcomers 0), or uniform ones when nobody has any.
    """
    known = np.full(len(sharpness), np.nan) if previous is None else np.asarray(previous, dtype=np.float64)
    valid = sharpness > 0
    if valid.any():
        return moving_average(power_weights(sharpness, q), known, valid, beta)
    if np.isnan(known).all():
        return np.full(len(sharpness), 1.0 / max(len(sharpness), 1))
    return np.where(np.isnan(known), 0.0, known)


def aggregate(weights: Floats, states: States) -> tuple[dict[str, Tensor] | None, Floats]:
    """Mean of the states, W = Σ ω_k W_k / Σ ω_k, over those with ω > 0 and without a non-finite value.

    In: ω (K,) ≥ 0 of any scale, K states. Out: the mean (integers: maximum), None when no state is left; and the share
    (K,) of each state in it.
    """
    usable = [w > 0 and first_non_finite(s) is None for w, s in zip(weights.tolist(), states, strict=True)]
    kept = np.where(np.array(usable, dtype=bool), weights, 0.0)
    shares = kept / kept.sum() if kept.sum() > 0 else kept
    return weighted_mean(zip(shares.tolist(), states, strict=True)), shares


class FedISM(Strategy):
    """Mean of the models by sharpness weights; sizes play no part. Holds all K replies, as weights need all losses."""

    Params: ClassVar[type] = FedISMParams
    State = FedISMState
    requires: ClassVar[tuple[str, ...]] = ("loss_base", "loss_perturbed")
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    def radius(self, round: int) -> float:
        """Radius ρ_t of a round, which training and measurement share."""
        return float(self.params.rho)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tell every site the radius."""
        return {}, {"rho": self.radius(round)}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Weigh the sites by the sharpness of the model they had received, and average."""
        received = list(updates)
        loss, perturbed_loss = (np.array([reported(update, key) for update in received]) for key in self.requires)
        previous = np.array([self.state.weights.get(update.site, np.nan) for update in received])
        found = sharpness(loss, perturbed_loss)
        weights = sharpness_weights(found, self.params.q, self.params.beta, previous)
        mean, shares = aggregate(weights, [update.arrays for update in received])
        sites = [update.site for update in received]
        by_site = dict(zip(sites, weights.tolist(), strict=True))
        self.state = replace(self.state, weights={**self.state.weights, **by_site})
        self.note("rho", self.radius(round))
        self.note("sharpness", dict(zip(sites, found.tolist(), strict=True)))
        self.note_weights(dict(zip(sites, shares.tolist(), strict=True)))
        return global_state if mean is None else {**global_state, **mean}


class FedISMPlus(FedISM):
    """FedISM with a radius that grows over the rounds of the run; memory as FedISM."""

    Params: ClassVar[type] = FedISMPlusParams
    depends_on_rounds: ClassVar[bool] = True

    def radius(self, round: int) -> float:
        """Radius of the round, ρ_t = ρ·((t + 1)/T)^p."""
        return growing_radius(self.params.rho, round, self.config.federation.rounds, self.params.power)
