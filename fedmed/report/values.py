"""Numbers out of the records of a run: curves over rounds, last values, and the means and extremes reports show.

Undefined values are NaN here; a mean leaves them out and is NaN when nothing is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmed.schema import lower_is_better

Record = Mapping[str, Any]


def number(value: Any) -> float:
    """Give a metric as float; None (how JSON carries NaN) and anything that is no number give NaN."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def mean(values: Iterable[float]) -> float:
    """Mean of the defined values; NaN when there are none."""
    kept = [v for v in values if not math.isnan(v)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def worst(metric: str, values: Iterable[float]) -> float:
    """The worst defined value: smallest, or largest for distances and losses; NaN when there are none."""
    kept = [v for v in values if not math.isnan(v)]
    if not kept:
        return math.nan
    return max(kept) if lower_is_better(metric) else min(kept)


def spread(values: Iterable[float]) -> float:
    """Best minus worst defined value, as a distance >= 0; NaN when there are none."""
    kept = [v for v in values if not math.isnan(v)]
    return max(kept) - min(kept) if kept else math.nan


def of_phase(history: Iterable[Record], phase: str) -> list[Record]:
    """Records of one phase that carry a result."""
    return [r for r in history if r.get("phase") == phase and r.get("status", "ok") == "ok"]


def curve(history: Iterable[Record], key: str, phase: str = "evaluate") -> dict[str, dict[int, float]]:
    """Give the values of one metric as site -> {round: value}; records without a site are filed under "central". Later
    records win.
    """
    lines: dict[str, dict[int, float]] = {}
    for record in of_phase(history, phase):
        if key in record.get("metrics", {}):
            site = "central" if record.get("site") is None else str(record["site"])
            lines.setdefault(site, {})[int(record["round"])] = number(record["metrics"][key])
    return lines


def mean_curve(lines: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Mean over the sites, round by round, of what `curve` gives."""
    rounds = sorted({r for line in lines.values() for r in line})
    return {r: mean(line[r] for line in lines.values() if r in line) for r in rounds}


def tail(history: Sequence[Record], key: str, phase: str, last: int = 3) -> list[float]:
    """Values of metric `key` in the last evaluations, oldest first: of the central test set, or the means over sites.

    `phase` is "central" or "evaluate". Shorter than `last` when there were fewer evaluations.
    """
    means = mean_curve(curve(history, key, phase))
    return [means[r] for r in sorted(means)][-last:]


def train_examples(history: Iterable[Record]) -> dict[str, int]:
    """Training items of each site, as it reported them with its last update."""
    return {
        str(r["site"]): int(r.get("num_examples") or 0) for r in of_phase(history, "train") if r.get("site") is not None
    }
