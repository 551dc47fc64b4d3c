"""Generalisation and specialisation of a method with a personal view: how good is the common model on everybody's items,
and how good is what each site ends with on its own?

G: the global model on the central test set, or the unweighted mean over sites of its scores where there is none. S: the
unweighted mean over sites of `test/personal/<metric>`. Whatever cannot be said is NaN (null once written), never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedmed.report.values import Record, mean, number, of_phase
from fedmed.schema import lower_is_better

_GLOBAL, _PERSONAL = "test/global/", "test/personal/"
_COUNTS = ("both_empty",)  # numbers of cases, neither good nor bad
Scores = dict[str, dict[str, Any]]  # site -> metrics of one evaluation


def specialisation(by_site: Mapping[str, float]) -> float:
    """S: mean over the sites (site -> score), each counting once; an undefined one is left out, NaN when none is left."""
    return mean(by_site.values())


def arithmetic(first: float, second: float) -> float:
    """(G + S)/2; NaN while one of them is undefined, since the other alone would flatter."""
    return (first + second) / 2


def harmonic(first: float, second: float) -> float:
    """2·G·S/(G + S) of two scores ≥ 0; 0 if both are 0, NaN while one is undefined."""
    total = first + second
    return 2 * first * second / total if total != 0 else 0.0


def pair(first: float, second: float) -> dict[str, float]:
    """G and S with both means."""
    known = not (math.isnan(first) or math.isnan(second))
    middle, balanced = (arithmetic(first, second), harmonic(first, second)) if known else (math.nan, math.nan)
    return {"G": first, "S": second, "mean": middle, "harmonic": balanced}


def site_scores(history: Sequence[Record], mode: str = "separate") -> tuple[Scores, Scores]:
    """Last scores of each site: of the model it had received, and of the one it had just trained.

    mode: `evaluation.mode`. With `after` the first evaluation of a site in a round it trained in rode on that training,
    any other is of the received model; in the other modes all are, and the second part is empty.
    """
    trained = {(r["round"], r["site"]) for r in of_phase(history, "train")} if mode == "after" else set()
    received: Scores = {}
    after: Scores = {}
    for record in of_phase(history, "evaluate"):
        site, key = record.get("site"), (record["round"], record.get("site"))
        if site is None:
            continue
        found = after if key in trained else received
        trained.discard(key)
        found[str(site)] = dict(record.get("metrics", {}))
    return received, after


def _metrics(*scores: Scores) -> list[str]:
    """Metrics of the personal view for which more is better, in the order they were reported."""
    names = dict.fromkeys(
        key.removeprefix(_PERSONAL)
        for by_site in scores
        for metrics in by_site.values()
        for key in metrics
        if key.startswith(_PERSONAL)
    )
    return [name for name in names if not lower_is_better(name) and name not in _COUNTS]


def _by_site(scores: Scores, key: str) -> dict[str, float]:
    return {site: number(metrics[key]) for site, metrics in sorted(scores.items()) if key in metrics}


def personal(history: Sequence[Record], mode: str = "separate") -> dict[str, Any]:
    """The entry `personal` of a summary: metric -> G, S, their means, where they are from, and both values of each site.

    `G_from`: `central`, `sites` or null; `S_from`: `trained` where sites scored the model they had just trained (mode
    `after`), else `received`. {} without scores of a personal view. A metric has G null where there is no global view.
    """
    received, after = site_scores(history, mode)
    central = [r.get("metrics", {}) for r in of_phase(history, "central")]
    found: dict[str, Any] = {}
    for metric in _metrics(received, after):
        own, origin = _by_site(after, _PERSONAL + metric), "trained"
        if not own:
            own, origin = _by_site(received, _PERSONAL + metric), "received"
        common = _by_site(received, _GLOBAL + metric)
        pooled = [number(m[_GLOBAL + metric]) for m in central if _GLOBAL + metric in m]
        where = "central" if pooled else "sites" if common else None
        generalisation = pooled[-1] if pooled else mean(common.values())
        found[metric] = {
            **pair(generalisation, specialisation(own)),
            "G_from": where,
            "S_from": origin,
            "sites": {
                site: {"global": common.get(site, math.nan), "personal": own.get(site, math.nan)}
                for site in sorted({*common, *own})
            },
        }
    return found
