"""Shares of the sites that a rule carries from round to round, and the numbers that sites report.

K sites replied in this round; shares are (K,) float64, ≥ 0, Σ = 1. The history is site → share, Σ = 1 over all sites
ever heard. Absence: a site that did not reply keeps its share, and those that did divide among them what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedmed.federation.messages import Update

Floats = npt.NDArray[np.float64]


def reported(update: Update, name: str) -> float:
    """A number that came with a reply; NaN if the site did not send it."""
    value = update.metrics.get(name, math.nan)
    return float(value) if isinstance(value, (int, float)) else math.nan


def normalise(weights: Floats, fallback: Floats) -> Floats:
    """Weights over their sum; where that is 0 or not finite, the fallback over its own. (K,), (K,) → (K,).

    The fallback needs a positive sum unless K = 0.
    """
    total = weights.sum()
    chosen = weights if total > 0 and np.isfinite(total) else fallback
    return np.asarray(chosen / chosen.sum(), dtype=np.float64)


def restrict(history: Mapping[str, float], sites: Sequence[str], default: Floats) -> tuple[Floats, float]:
    """Restrict the history to the sites that replied: their shares (K,), and what they hold together.

    `default` (K,), Σ > 0: what a newcomer holds; all take it where what is held sums to 0.
    """
    held = np.array([history.get(site, own) for site, own in zip(sites, default.tolist(), strict=True)])
    mass = float(held.sum())
    return normalise(held, default), mass if mass > 0 else float(default.sum())


def remember(history: Mapping[str, float], sites: Sequence[str], shares: Floats, mass: float) -> dict[str, float]:
    """New history: the sites that replied divide `mass` by `shares`, the others keep what they have; Σ = 1 again."""
    held = {**history, **{site: mass * share for site, share in zip(sites, shares.tolist(), strict=True)}}
    total = sum(held.values())
    return {site: share / total for site, share in held.items()} if total > 0 else held
