"""Generalisation and specialisation of a method with a personal view: how good is the common model on everybody's items,
and how good is what each site ends with on its own?

G: the global model on the central test set, or the unweighted mean over sites of its scores where there is none. S: the
unweighted mean over sites of `test/personal/<metric>`. L, where a local-only run of the same sites is named: the same
mean of what each site reached without the others. Whatever cannot be said is NaN (null once written), never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.errors import UserError
from fedmed.files import read_json
from fedmed.report.run_folder import RunFolder
from fedmed.report.values import Record, mean, number, of_phase
from fedmed.schema import lower_is_better

_GLOBAL, _PERSONAL = "test/global/", "test/personal/"
_COUNTS = ("both_empty",)  # numbers of cases, neither good nor bad
ALONE = "alone"  # `S_from` of a local-only run
Scores = dict[str, dict[str, Any]]  # site -> metrics of one evaluation
LocalScores = Mapping[str, Mapping[str, float]]  # metric -> site -> score of what the site trained alone


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


def personal_view(history: Sequence[Record], metric: str, mode: str = "separate") -> dict[str, float]:
    """Score of each site in the personal view as S takes it, for any metric; {} where there is no such view."""
    received, after = site_scores(history, mode)
    return _by_site(after, _PERSONAL + metric) or _by_site(received, _PERSONAL + metric)


def read_local(folder: Path, metric: str, sites: Iterable[str]) -> LocalScores:
    """Read what the sites of a finished local-only run reached, for `personal`: their last scores.

    Raises `UserError` for another kind of folder, and where a site of `sites` or the metric this run is judged by is missing.
    """
    key, path = f"evaluation.local_only: {folder}", RunFolder(folder).summary
    if not path.is_file():
        raise UserError(
            f"{key} holds no summary.json; give the folder of a finished run with federation.local_only=true"
        )
    summary = read_json(path)
    found: dict[str, Any] = summary.get("personal") or {}
    if not any(scores.get("S_from") == ALONE for scores in found.values()):
        raise UserError(
            f"{key} is not a local-only run whose sites were scored; make one with federation.local_only=true evaluation.sites=true"
        )
    if metric not in found:
        raise UserError(f"{key} has no {metric} (it has {', '.join(found)}); give a local-only run of the same task")
    missing = sorted(set(sites) - set(summary["sites"]))
    if missing:
        raise UserError(
            f"{key} is of other sites ({', '.join(summary['sites'])}), {missing[0]} is not among them; give a local-only run of the same sites"
        )
    return {
        name: {site: number(values["personal"]) for site, values in scores["sites"].items()}
        for name, scores in found.items()
    }


def personal(
    history: Sequence[Record], mode: str = "separate", *, alone: bool = False, local: LocalScores | None = None
) -> dict[str, Any]:
    """The entry `personal` of a summary: metric -> G, S, their means, where they are from, and both values of each site.

    `G_from`: `central`, `sites` or null; `S_from`: `alone` for a local-only run, `trained` where sites scored the model they
    had just trained (mode `after`), else `received`. With `local` (see `read_local`) also L, and `local` of each site. {}
    without scores of a personal view. A metric has G null where there is no global view.
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
        sites = sorted({*common, *own})
        views = {"global": common, "personal": own}
        found[metric] = pair(generalisation, specialisation(own))
        if local is not None:
            views["local"] = {site: value for site, value in local.get(metric, {}).items() if site in sites}
            found[metric]["L"] = specialisation(views["local"])
        found[metric] |= {
            "G_from": where,
            "S_from": ALONE if alone else origin,
            "sites": {site: {view: by_site.get(site, math.nan) for view, by_site in views.items()} for site in sites},
        }
    return found
