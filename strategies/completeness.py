"""FedIA: trust a site by how completely it annotates, and have each site complete its masks once its curve bends.

Source: "FedIA: Federated Medical Image Segmentation with Heterogeneous Annotation Completeness", MICCAI 2024, arXiv
2407.02280, and its official code. The local half is `clients/annotation_completion.py`.
Symbols: K sites, L_k^t → loss (soft Dice loss of round t), u_k^t → iou, a_k → completeness, T₀ → warmup_last_round,
n_k → num_examples, w_k → weights; t counts rounds from 0 (t = round − 1).

Departures from the official code:
weights: a_k in [0, 1], 1 while unknown; L_k ≥ min_loss; softmax less its largest exponent (official: exp overflows);
sites without a finite loss are left out, and with nobody left the model stays. The temperature is our option.
trend: closed-form least squares over the rounds a site was there; one point gives a flat line; a site without any is
never corrected and holds nobody up.
absence: a completeness or a correction that is due is asked for until the site's reply is accepted, and a correction
again when the site reports fewer added pixels than before (it lost them). Counters: maximum (official: truncated mean).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedmed.federation.state import weighted_mean
from fedmed.federation.strategy import Strategy, Update
from strategies.site_shares import reported

Floats = npt.NDArray[np.float64]
Line = tuple[float, float]
Replies = Mapping[str, Update]  # by site, without their arrays

LOSS = "loss/dice"  # the Dice loss alone, whatever add-ons put on top of it


@dataclass(frozen=True)
class FedIAParams:
    """Constants of the method; defaults are the official code's unless marked."""

    warmup_last_round: int = 30  # T₀ ≥ 0: FedAvg for t = 0 … T₀ (T₀ + 1 rounds); completeness is measured in the last
    margin: float = 0.03  # in [−1, 1], how far u may fall below its line before the masks are corrected
    threshold: float = 0.8  # in [0, 1), probability above which a background pixel is added to a mask
    temperature: float = 1.0  # ≥ 1e-6, divides the exponents a_k / L_k; above 1 the weights are flatter (our option)
    min_loss: float = 1e-3  # in [1e-6, 1], a smaller L_k counts as this (our option)

    def __post_init__(self) -> None:
        numbers = -1 <= self.margin <= 1 and self.temperature >= 1e-6 and 1e-6 <= self.min_loss <= 1
        if not (numbers and self.warmup_last_round >= 0 and 0 <= self.threshold < 1):
            raise ValueError(f"a value is outside its range, see strategies/completeness.py: {self}")


@dataclass(frozen=True)
class FedIAState:
    """What survives a round, by site. `round` counts from 1."""

    losses: dict[str, list[float]] = field(default_factory=dict)  # L_k^t by t, NaN = absent; may end before this round
    completeness: dict[str, float] = field(default_factory=dict)  # a_k as reported, finite; absent: not measured yet
    line: dict[str, list[float]] = field(default_factory=dict)  # slope and intercept of u over t = 0 … T₀
    flagged: dict[str, int] = field(default_factory=dict)  # round in which the curve fell below its line
    due: dict[str, int] = field(default_factory=dict)  # round from which a correction is asked for, until it is done
    corrected: dict[str, int] = field(default_factory=dict)  # round of the last correction that was accepted
    pixels: dict[str, int] = field(default_factory=dict)  # added pixels the site last reported


def iou_proxy(loss: npt.ArrayLike) -> Floats:
    """Turn Dice losses into IoU, u = (1 − L)/(1 + L). Any shape; NaN where L is not finite or ≤ −1 (no Dice loss is)."""
    values = np.asarray(loss, dtype=np.float64)
    known = np.isfinite(values) & (values > -1.0)
    safe = np.where(known, values, 0.0)
    return np.where(known, (1.0 - safe) / (1.0 + safe), np.nan)


def fit_line(iou: Floats) -> Line | None:
    """Least squares u ≈ slope·t + intercept. In: u (T,), place = t, NaN = absent. One value: slope 0. None: no line."""
    t = np.flatnonzero(np.isfinite(iou))
    if not t.size:
        return None
    u, centred = iou[t], t - t.mean()
    spread = float(centred @ centred)
    slope = float(centred @ u) / spread if spread > 0 else 0.0
    return slope, float(u.mean() - slope * t.mean())


def gap(line: Line, t: npt.ArrayLike, iou: npt.ArrayLike) -> Floats:
    """How far the curve is below its line: slope·t + intercept − u. t and u of one shape."""
    return np.asarray(line[0] * np.asarray(t, dtype=np.float64) + line[1] - np.asarray(iou, dtype=np.float64))


def triggered(line: Line, t: int, loss: float, margin: float = 0.03) -> bool:
    """True if the gap is larger than the margin (strictly); an undefined loss never triggers."""
    return bool(gap(line, t, iou_proxy(loss)) > margin)


def exponents(completeness: Floats, loss: Floats, temperature: float = 1.0, min_loss: float = 1e-3) -> Floats:
    """Exponents a_k / (temperature · L_k). In: a (K,), NaN = unknown, counts as 1, clipped to [0, 1]; L (K,), at least
    `min_loss`. Out: (K,), ≥ 0; NaN where the loss is not finite.
    """
    a = np.clip(np.where(np.isnan(completeness), 1.0, completeness), 0.0, 1.0)
    finite = np.isfinite(loss)
    below = temperature * np.maximum(np.where(finite, loss, 1.0), min_loss)
    return np.where(finite, a / below, np.nan)


def completeness_weights(exponent: Floats, num_examples: Floats) -> Floats:
    """Softmax of the exponents, w_k = exp(e_k) / Σ_j exp(e_j); n_k does not enter. In: e (K,), n (K,). Out: (K,).

    A site with e_k NaN or n_k = 0 has weight 0; nobody left (or K = 0): all 0.
    """
    kept = np.isfinite(exponent) & (num_examples > 0)
    highest = exponent[kept].max(initial=0.0)  # subtracted, so that the largest term is 1 and nothing overflows
    weights = np.where(kept, np.exp(np.where(kept, exponent, highest) - highest), 0.0)
    return weights / weights.sum() if kept.any() else weights


def sizes(replies: Replies) -> Floats:
    """n_k of the replies, (K,)."""
    return np.array([reply.num_examples for reply in replies.values()], dtype=np.float64)


def size_weights(num_examples: Floats) -> Floats:
    """Weights of FedAvg, n_k / Σ n. (K,) → (K,); Σ n = 0: all 0."""
    total = num_examples.sum()
    return num_examples / total if total > 0 else np.zeros(len(num_examples))


def all_flagged(line: Mapping[str, Any], flagged: Mapping[str, Any]) -> bool:
    """True when every site that has a line was flagged; False while no site has one. Sites without a line (they came
    after the warm-up) cannot be flagged and are not waited for.
    """
    return bool(line) and all(site in flagged for site in line)


def observe(state: FedIAState, t: int, warmup_last_round: int, replies: Replies) -> FedIAState:
    """Enter what the sites of round t reported: losses, and from t = T₀ on the first finite completeness of a site."""
    losses, completeness = dict(state.losses), dict(state.completeness)
    for site, reply in replies.items():
        row = losses.get(site, [])[:t]
        losses[site] = [*row, *[math.nan] * (t - len(row)), reported(reply, LOSS)]
        a = reported(reply, "completeness")
        if t >= warmup_last_round and math.isfinite(a):
            completeness.setdefault(site, a)
    return replace(state, losses=losses, completeness=completeness)


def fitted_lines(losses: Mapping[str, list[float]], num_rounds: int) -> dict[str, list[float]]:
    """Line of each site over its first `num_rounds` rounds; sites without a defined loss in them are left out."""
    found = {site: fit_line(iou_proxy(row[:num_rounds])) for site, row in losses.items()}
    return {site: list(line) for site, line in found.items() if line is not None}


def watch(state: FedIAState, t: int, warmup_last_round: int, margin: float, replies: Replies) -> FedIAState:
    """Fit the lines once the warm-up is over; for t > T₀ flag the sites whose curve fell below, each once, and have
    them corrected from round t + 1 on.
    """
    if t < warmup_last_round:
        return state
    line, flagged, due = state.line or fitted_lines(state.losses, warmup_last_round + 1), state.flagged, state.due
    for site in (s for s in replies if t > warmup_last_round and s in line and s not in flagged):
        if triggered((line[site][0], line[site][1]), t, state.losses[site][t], margin):
            flagged, due = {**flagged, site: t + 1}, {**due, site: t + 2}
    return replace(state, line=line, flagged=flagged, due=due)


def account(state: FedIAState, round: int, replies: Replies) -> FedIAState:
    """Enter the corrections: one that was due in this round is done; a site with fewer added pixels than before lost
    them and is asked again.
    """
    due, corrected, pixels = dict(state.due), dict(state.corrected), dict(state.pixels)
    for site, reply in replies.items():
        count = reported(reply, "n_corrected_pixels")
        if not math.isfinite(count):
            continue
        if due.get(site, round + 1) <= round:
            del due[site]
            corrected[site] = round
        elif count < pixels.get(site, 0):
            due[site] = round + 1
        pixels[site] = int(count)
    return replace(state, due=due, corrected=corrected, pixels=pixels)


class FedIA(Strategy):
    """FedAvg while t ≤ T₀ and again once all sites are flagged (running sum, one reply in memory); in between the
    completeness weights, which need the losses of all replies of the round (holds all K of them).
    """

    Params = FedIAParams
    State = FedIAState
    requires: ClassVar[tuple[str, ...]] = ("completeness", "n_corrected_pixels")
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def payload(self, round: int, site: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Ask for the completeness from round T₀ + 1 on until it is known, for a correction when one is due."""
        measure = round > self.params.warmup_last_round and site not in self.state.completeness
        correct = self.state.due.get(site, round + 1) <= round
        return {}, {"measure": int(measure), "correct": int(correct), "threshold": self.params.threshold}

    def aggregate(self, round: int, global_state: dict[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
        """Average by size or by completeness, then look at the curves and the corrections."""
        t, last, replies = round - 1, self.params.warmup_last_round, dict[str, Update]()
        if round == 1 and self.config.federation.rounds < last + 3:
            self.log.warning("no mask will be corrected: that begins in round %d at the earliest", last + 3)
        updates = self._heard(updates, replies)
        if t <= last or all_flagged(self.state.line, self.state.flagged):
            result = super().aggregate(round, global_state, updates)
            self.state = observe(self.state, t, last, replies)
            weights = size_weights(sizes(replies))
        else:
            states = [update.arrays for update in updates]
            self.state = observe(self.state, t, last, replies)
            weights = self._weights(t, replies)
            mean = weighted_mean(zip(weights.tolist(), states, strict=True))
            result = global_state if mean is None else {**global_state, **mean}
        self.state = watch(self.state, t, last, self.params.margin, replies)
        self.state = account(self.state, round, replies)
        self._report(dict(zip(replies, weights.tolist(), strict=True)))
        return result

    @staticmethod
    def _heard(updates: Iterable[Update], replies: dict[str, Update]) -> Iterator[Update]:
        """Pass the updates on and remember what else the sites said."""
        for update in updates:
            replies[update.site] = replace(update, arrays={}, extras={})
            yield update
            del update

    def _weights(self, t: int, replies: Replies) -> Floats:
        """Completeness weights of the sites that replied, in their order."""
        a = np.array([self.state.completeness.get(site, math.nan) for site in replies], dtype=np.float64)
        loss = np.array([self.state.losses[site][t] for site in replies], dtype=np.float64)
        exponent = exponents(a, loss, self.params.temperature, self.params.min_loss)
        return completeness_weights(exponent, sizes(replies))

    def _report(self, weights: dict[str, float]) -> None:
        """Note what the weights were and rest on, and who completed how many pixels when."""
        self.note_weights(weights)
        self.note("completeness", self.state.completeness)
        self.note("corrected", self.state.corrected)
        self.note("corrected_pixels", {site: self.state.pixels[site] for site in self.state.corrected})
        self.note("all_flagged", all_flagged(self.state.line, self.state.flagged))
