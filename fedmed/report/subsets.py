"""Which modalities does the model need? Its scores on the subsets of the modalities, and how far they lie apart.

Scores are those of the global view, `test-with+<names joined by +>/global/<metric>`. Whatever cannot be said is NaN (null
once written), never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmed.report.values import Record, mean, number, of_phase, spread, worst
from fedmed.schema import SUBSET_SPLIT

_COUNT = "n/"  # before the name of a split: its number of items


def is_subset(name: str) -> bool:
    """Whether a split, or a metric `<split>/...`, belongs to items that show a subset of their modalities."""
    return name.startswith(SUBSET_SPLIT)


def by_subset(metrics: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Subset ("FLAIR+T1") -> value of a metric, in the order of scoring (small subsets first).

    A subset of which no item has any modality was counted (n 0) and not scored: NaN. {} when none has this metric.
    """
    tail = f"/global/{metric}"
    splits = dict.fromkeys(
        name.removeprefix(_COUNT).split("/", 1)[0] for name in metrics if is_subset(name.removeprefix(_COUNT))
    )
    if not any(split + tail in metrics for split in splits):
        return {}
    return {split.removeprefix(SUBSET_SPLIT): number(metrics.get(split + tail)) for split in splits}


def mean_over_sites(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean over the sites, subset by subset, each site counting once; sites that could not be scored are left out."""
    tables = list(tables)
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: mean(table[name] for table in tables if name in table) for name in names}


def over_subsets(metric: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Mean over the subsets that are defined, best minus worst, the worst value and whose it is (the first of equals)."""
    lowest = worst(metric, values.values())
    return {
        "metric": metric,
        "by_subset": dict(values),
        "mean": mean(values.values()),
        "spread": spread(values.values()),
        "worst": lowest,
        "worst_subset": next((name for name, v in values.items() if v == lowest), None),
    }


def subsets(history: Sequence[Record], metric: str | None) -> dict[str, Any]:
    """The entry `subsets` of a summary, of the last round with such scores; {} when there are none.

    Of the central test set (`from`: "central"), else means over the sites ("sites").
    """
    name = metric or ""
    for origin, phase in (("central", "central"), ("sites", "evaluate")):
        scored = [(r, by_subset(r.get("metrics", {}), name)) for r in of_phase(history, phase)]
        scored = [(record, table) for record, table in scored if table]
        if scored:
            last = max(int(record["round"]) for record, _ in scored)
            values = mean_over_sites(table for record, table in scored if int(record["round"]) == last)
            return {"from": origin, "round": last, **over_subsets(name, values)}
    return {}
