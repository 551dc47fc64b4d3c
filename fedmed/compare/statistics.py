"""Statistics of a comparison: means over seeds, differences paired by seed, a signed-rank test, ties. Numbers in, numbers out.

Undefined numbers are NaN (or None where the docstring says so) and left out; whoever is left out is counted. Symbols: n
pairs, d_i the difference of pair i (arm minus baseline), m their mean, s their standard deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

CONFIDENCE = 0.95
_SAME = 1e-12  # differences below this are rounding, not results
BySeed = Mapping[int, float]  # seed -> value of a run, NaN where undefined
BySite = Mapping[int, Mapping[str, float]]  # seed -> site -> value


class Paired(NamedTuple):
    """A difference paired by seed; sd, low and high are NaN for fewer than two pairs, mean for none."""

    mean: float
    sd: float  # sample standard deviation of the differences
    low: float  # 95 % t-interval of the mean
    high: float
    seeds: int  # pairs with both values defined
    missing: int  # seeds of which one value is not


class Pairs(NamedTuple):
    """Differences of the pairs that are tested, and what a pair is."""

    differences: list[float]
    per: str  # "seed x site" or "seed"


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation sqrt(Σ (x_i − x̄)² / (n − 1)) of the defined values.

    The mean of none is NaN, and so is the deviation of fewer than two.
    """
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return math.nan, math.nan
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan


def paired(arm: BySeed, baseline: BySeed) -> Paired:
    """Mean difference by seed with its t-interval m ± t(0.975; n − 1) · s / √n (Student 1908, Biometrika 6:1).

    It supposes that the differences are roughly normal. Seeds that either side lacks are left out and counted.
    """
    seeds = {*arm, *baseline}
    gains = [arm.get(seed, math.nan) - baseline.get(seed, math.nan) for seed in sorted(seeds)]
    gains = [gain for gain in gains if not math.isnan(gain)]
    middle, deviation = mean_sd(gains)
    half = math.nan
    if len(gains) > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)) * deviation / math.sqrt(len(gains))
    return Paired(middle, deviation, middle - half, middle + half, len(gains), len(seeds) - len(gains))


def matched_pairs(arm: BySeed, baseline: BySeed, arm_sites: BySite, baseline_sites: BySite) -> Pairs:
    """Differences over all (seed, site) with both values defined; over the seeds where no site has both."""
    found = [
        value - baseline_sites.get(seed, {}).get(site, math.nan)
        for seed, sites in sorted(arm_sites.items())
        for site, value in sorted(sites.items())
    ]
    found = [d for d in found if not math.isnan(d)]
    if found:
        return Pairs(found, "seed x site")
    by_seed = [value - baseline.get(seed, math.nan) for seed, value in sorted(arm.items())]
    return Pairs([d for d in by_seed if not math.isnan(d)], "seed")


def signed_rank(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test (Wilcoxon 1945, Biometrics Bulletin 1:80) that d is symmetric about 0.

    W⁺ = Σ rank(|d_i|) over d_i > 0, equal |d_i| sharing the mean of their ranks. Zero differences are dropped, as Wilcoxon
    does. SciPy takes the exact distribution up to 50 differences of which no two are equal, that of all sign flips up to 13 with
    equal ones, the normal approximation beyond. None for fewer than two pairs and where all differences are 0.
    """
    # Rounding makes differences equal that are so but for the last bit, which decides about shared ranks.
    moved = [round(d, 12) for d in differences if abs(d) >= _SAME]
    if len(differences) < 2 or not moved:
        return None
    from scipy.stats import wilcoxon

    return float(wilcoxon(moved, method="auto").pvalue)


def tally(differences: Iterable[float], smaller_is_better: bool = False) -> tuple[int, int, int]:
    """Count wins, ties (|d| < 1e-12) and losses of the arm over its pairs."""
    signs = [0 if abs(d) < _SAME else (-1 if (d < 0) != smaller_is_better else 1) for d in differences]
    return signs.count(1), signs.count(0), signs.count(-1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for their number m (Holm 1979, Scand. J. Statist. 6:65): with p_(1) <= ... <= p_(m) sorted,

    p̃_(i) = min(1, max over j <= i of (m − j + 1) · p_(j)). None stays None and does not count.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def best_and_tied(values: Mapping[str, BySeed], smaller_is_better: bool = False) -> tuple[set[str], set[str]]:
    """Arms with the best mean, and those that are not best but whose paired difference from the best has 0 in its interval.

    Nothing is tied with fewer than two common seeds. Undefined means are neither.
    """
    means = {arm: mean_sd(by_seed.values())[0] for arm, by_seed in values.items()}
    means = {arm: m for arm, m in means.items() if not math.isnan(m)}
    if not means:
        return set(), set()
    top = (min if smaller_is_better else max)(means, key=lambda arm: means[arm])
    best = {arm for arm, m in means.items() if abs(m - means[top]) < _SAME}
    gaps = {arm: paired(values[arm], values[top]) for arm in means if arm not in best}
    return best, {arm for arm, gap in gaps.items() if gap.low <= 0 <= gap.high}


def outcome(low: float | None, high: float | None, smaller_is_better: bool = False) -> int:
    """1 where the whole interval lies on the good side of 0, -1 where it lies on the bad side, else 0 (also without interval)."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return 0
    sign = (low > 0) - (high < 0)
    return -sign if smaller_is_better else sign


def compare(
    values: Mapping[str, BySeed], sites: Mapping[str, BySite], baseline: str, smaller_is_better: bool = False
) -> dict[str, dict[str, Any]]:
    """Compare the arms of one setting in one metric: arm -> mean, sd, best, tied, difference (None for the baseline).

    `values` and `sites`: by arm. A difference has mean, sd, low, high, seeds and missing of `Paired`, p, p_holm (over the arms
    given here), pairs and per of the test, wins, ties and losses over these pairs.
    """
    best, tied = best_and_tied(values, smaller_is_better)
    others = [arm for arm in values if arm != baseline]
    base, base_sites = values.get(baseline, {}), sites.get(baseline, {})
    pairs = {arm: matched_pairs(values[arm], base, sites.get(arm, {}), base_sites) for arm in others}
    p_values = {arm: signed_rank(found.differences) for arm, found in pairs.items()}
    adjusted = dict(zip(others, holm(list(p_values.values())), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for arm, by_seed in values.items():
        middle, deviation = mean_sd(by_seed.values())
        found[arm] = {"mean": middle, "sd": deviation, "best": arm in best, "tied": arm in tied, "difference": None}
        if arm == baseline:
            continue
        wins, ties, losses = tally(pairs[arm].differences, smaller_is_better)
        tested = {
            "p": p_values[arm],
            "p_holm": adjusted[arm],
            "pairs": len(pairs[arm].differences),
            "per": pairs[arm].per,
        }
        counted = {"wins": wins, "ties": ties, "losses": losses}
        found[arm]["difference"] = {**paired(by_seed, base)._asdict(), **tested, **counted}
    return found
