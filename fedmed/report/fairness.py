"""Does the model serve everybody? Its scores on clean and degraded test items, and how evenly they lie over the sites.

Central scores are those of the global view: `test/global/<metric>` on the clean items, `test-<condition>/global/<metric>`
on the same items under a condition. Whatever cannot be said is NaN (null once written), never 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmed.report.values import Record, curve, mean, of_phase, spread, worst
from fedmed.schema import SUBSET_SPLIT

CLEAN, CORRUPTED = "clean", "corrupted"
LAST_ROUNDS = 5  # evaluations a `tail` averages; single rounds jump
_VIEW = "global"  # the only view the coordinator can score


def is_condition(name: str) -> bool:
    """Whether a split, or a metric `<split>/...`, belongs to items under a condition ("test-corrupted").

    Items without some of their modalities (`test-with+...`) are none: `fedmed.report.subsets` is about them.
    """
    return name.startswith("test-") and not name.startswith(SUBSET_SPLIT)


def condition_keys(names: Iterable[str], metric: str) -> dict[str, str]:
    """Condition -> full name of `metric` among `names`, "clean" first, the others by name.

    `test/global/bacc` is clean, `test-corrupted/global/bacc` is corrupted; other splits and views are no conditions.
    """
    tail = f"/{_VIEW}/{metric}"
    names = set(names)
    degraded = sorted(name for name in names if is_condition(name) and name.endswith(tail))
    clean = {CLEAN: f"test{tail}"} if f"test{tail}" in names else {}
    return clean | {name.removeprefix("test-").removesuffix(tail): name for name in degraded}


def balance(by_condition: Mapping[str, float]) -> tuple[float, float]:
    """Mean over the conditions, and gap between the best and the worst of them (of two: their distance).

    Both are NaN while one condition is undefined, since the rest would flatter; a gap needs two conditions.
    """
    values = list(by_condition.values())
    if not values or any(math.isnan(v) for v in values):
        return math.nan, math.nan
    return mean(values), spread(values) if len(values) > 1 else math.nan


def over_sites(metric: str, values: Mapping[str, float], truth: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How evenly one metric lies over the sites (site -> value): mean, worst and whose it is, spread, std, groups.

    std is that of the population, 0 for one site. `by_group`: means over the sites whose training data are clean and
    corrupted (`is_noisy` in `truth`; unknown sites are in neither); `group_gap` is their distance.
    """
    defined = {site: v for site, v in sorted(values.items()) if not math.isnan(v)}
    lowest = worst(metric, defined.values())
    groups = {
        name: mean(v for site, v in defined.items() if truth.get(site, {}).get("is_noisy") == noisy)
        for name, noisy in ((CLEAN, False), (CORRUPTED, True))
    }
    return {
        "mean": mean(defined.values()),
        "worst": lowest,
        "worst_site": next((site for site, v in defined.items() if v == lowest), None),
        "spread": spread(defined.values()),
        "std": statistics.pstdev(defined.values()) if defined else math.nan,
        "by_group": groups,
        "group_gap": abs(groups[CLEAN] - groups[CORRUPTED]),
    }


def over_conditions(history: Sequence[Record], metric: str, last: int) -> dict[str, Any]:
    """Central scores by condition with their mean and gap, over the last `last` evaluations (fewer if there are fewer).

    An undefined value is left out of the mean over rounds; `last_rounds` counts the evaluations looked at.
    """
    records = of_phase(history, "central")
    rounds = sorted({int(r["round"]) for r in records})[-last:]
    keys = condition_keys((key for r in records for key in r.get("metrics", {})), metric)
    lines = {name: curve(records, key, "central")["central"] for name, key in keys.items()}
    by_condition = {name: mean(line.get(r, math.nan) for r in rounds) for name, line in lines.items()}
    middle, gap = balance(by_condition)
    return {"last_rounds": len(rounds), "by_condition": by_condition, "mean": middle, "gap": gap}


def fairness(
    history: Sequence[Record],
    metric: str | None,
    sites: Mapping[str, float],
    truth: Mapping[str, Mapping[str, Any]],
    last: int = LAST_ROUNDS,
) -> dict[str, Any]:
    """The entry `fairness` of a summary: conditions in the last round and in the `tail` of the run, and the sites.

    `sites`: site -> last value of the judged metric. Without conditions `by_condition` is empty or holds the clean
    value alone, and gap is NaN.
    """
    name = metric or ""
    now = over_conditions(history, name, 1)
    del now["last_rounds"]
    return {
        "metric": metric,
        **now,
        "tail": over_conditions(history, name, last),
        "sites": over_sites(name, sites, truth),
    }
