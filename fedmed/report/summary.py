"""From the records of a run to its numbers: which metric judges it, per-site results, spread, central results, noisy
sites found.

Undefined values stay NaN here and become null when written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.files import read_history
from fedmed.report.fairness import fairness, is_condition
from fedmed.report.personal import LocalScores, personal
from fedmed.report.subsets import is_subset, subsets
from fedmed.report.values import Record, curve, mean, mean_curve, number, of_phase, spread, train_examples, worst
from fedmed.schema import lower_is_better

# The metric a task is judged by, most telling first, for runs that do not say.
_MAIN_METRICS = ("dice", "bacc", "auc", "map", "acc", "f1")
_PACKAGES = ("fedmed", "flwr", "torch", "monai", "numpy", "ray")


def infer_main_metric(history: Sequence[Record]) -> str | None:
    """The metric that judges the run, from the names in its evaluation records; None when nothing was evaluated."""
    names = {
        key.rsplit("/", 1)[-1]
        for r in history
        if r.get("phase") in ("evaluate", "central")
        for key in r.get("metrics", {})
    }
    return next((name for name in _MAIN_METRICS if name in names), min(names, default=None))


def judged_prefix(history: Sequence[Record], metric: str | None) -> str | None:
    """Give "<split>/<view>" by which the run is judged: test before val, views in the order the sites name them; None
    without evaluation.
    """
    prefixes: dict[str, None] = {}
    for phase in ("evaluate", "central"):
        for record in of_phase(history, phase):
            for key in record.get("metrics", {}):
                prefix, _, name = key.rpartition("/")
                if prefix and (metric is None or name == metric):
                    prefixes.setdefault(prefix)
    plain = [p for p in prefixes if not is_condition(p) and not is_subset(p)]  # degraded items never judge a run
    return next((p for split in ("test", "val") for p in plain if p.split("/")[0] == split), next(iter(plain), None))


def site_names(history: Iterable[Record]) -> list[str]:
    """All sites that occur in the records, sorted."""
    return sorted({str(r["site"]) for r in history if r.get("site") is not None})


def select_round(history: Sequence[Record], select: str | None) -> int | None:
    """The round with the best validation value of metric `select`, averaged over sites; the first of equals.

    `select` is a metric ("bacc") or a full name ("val/personal/bacc"). Test values are never used to choose unless
    spelled out in full. None when `select` is None or no such value was recorded.
    """
    if select is None:
        return None
    keys = dict.fromkeys(
        k for phase in ("evaluate", "central") for r in of_phase(history, phase) for k in r.get("metrics", {})
    )
    key = (
        select
        if "/" in select
        else next((k for k in keys if k.startswith("val/") and k.rsplit("/", 1)[-1] == select), None)
    )
    if key is None:
        return None
    means = mean_curve(curve(history, key)) or mean_curve(curve(history, key, "central"))
    sign = -1.0 if lower_is_better(select) else 1.0
    defined = {r: sign * v for r, v in means.items() if not math.isnan(v)}
    return max(defined, key=lambda r: (defined[r], -r)) if defined else None


def site_results(history: Sequence[Record], prefix: str | None) -> dict[str, dict[str, Any]]:
    """Last evaluation of each site: metrics of the judged split and view under their short names, the others in full,
    plus n and round.

    `n` counts the scored items as the site reported them.
    """
    found: dict[str, dict[str, Any]] = {site: {} for site in site_names(history)}
    for record in of_phase(history, "evaluate"):
        if record.get("site") is None:
            continue
        short = {"n": record.get("num_examples"), "round": record.get("round")}
        for key, value in record.get("metrics", {}).items():
            head, _, name = key.rpartition("/")
            short[name if head == prefix else key] = value
        found[str(record["site"])] = short
    return found


def noisy_sites(notes: Mapping[str, Any], truth: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the sites a method believes noisy (`notes["believed_noisy"]`, names) with the truth (`is_noisy` of each
    site).

    precision = hits / believed, recall = hits / true; None where the denominator is 0, the method says nothing, or the
    truth is unknown.
    """
    said = notes.get("believed_noisy")
    believed = sorted(str(s) for s in said) if isinstance(said, (list, tuple, set)) else []
    known = any("is_noisy" in info for info in truth.values())
    true = sorted(site for site, info in truth.items() if info.get("is_noisy"))
    hits = len(set(believed) & set(true))
    judged = said is not None and known
    return {
        "believed": believed,
        "true": true,
        "precision": hits / len(believed) if judged and believed else None,
        "recall": hits / len(true) if judged and true else None,
    }


def failures(history: Iterable[Record]) -> list[dict[str, Any]]:
    """Every failed answer: round, phase, site, reason."""
    return [{k: r.get(k) for k in ("round", "phase", "site", "reason")} for r in history if r.get("status") == "failed"]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; packages that are not installed are left out."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _central(history: Sequence[Record], select: str | None) -> dict[str, Any]:
    records = of_phase(history, "central")
    by_round = {int(r["round"]): dict(r.get("metrics", {})) for r in records}
    chosen = select_round(history, select)
    last = max(by_round, default=None)
    return {
        "last": {"round": last, **by_round[last]} if last is not None else {},
        "selected": {"round": chosen, **by_round.get(chosen, {})} if chosen is not None else {},
    }


def build_summary(
    run_dir: str | Path,
    history: Sequence[Record] | None,
    config: Any,
    truth: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    main_metric: str | None = None,
    seconds: float | None = None,
    local: LocalScores | None = None,
) -> dict[str, Any]:
    """Build the content of `summary.json` from the records of a run (None: those in `run_dir`).

    `truth` is what the site file says about its corrupted sites (site -> `is_noisy`, `noise_rate`, ...), empty if
    nothing is known. `main_metric` and `seconds` (wall time) are taken from the history when not given: the first known
    metric in it, the sum of the records' seconds. `local`: scores of a local-only run, for `fedmed.report.personal`. mean,
    worst and spread (best minus worst) are over the sites' last values of the main metric, each site counting once.
    """
    history = read_history(Path(run_dir)) if history is None else history
    truth = truth or {}
    metric = main_metric or infer_main_metric(history)
    prefix = judged_prefix(history, metric)
    sites = site_results(history, prefix)
    scores = {site: number(result.get(metric or "")) for site, result in sites.items()}
    values = list(scores.values())
    notes: dict[str, Any] = {}
    for record in of_phase(history, "server"):
        notes.update(record.get("metrics", {}))
    alone = bool(getattr(config.federation, "local_only", False))
    spent = [number(r.get("seconds", 0.0)) for r in history]
    trained = [int(r["round"]) for r in of_phase(history, "train")]
    return {
        "name": config.name,
        "engine": config.engine.name,
        "seed": config.seed,
        "rounds": max(trained, default=0),
        "main_metric": metric,
        "judged_by": prefix,
        "sites": sites,
        "mean": mean(values),
        "worst": worst(metric or "", values),
        "spread": spread(values),
        "central": _central(history, config.evaluation.select),
        "fairness": fairness(history, metric, scores, truth),
        "subsets": subsets(history, metric),
        "personal": personal(history, getattr(config.evaluation, "mode", "separate"), alone=alone, local=local),
        "notes": notes,
        "examples": train_examples(history),
        "truth": {site: dict(info) for site, info in truth.items()},
        "noisy_sites": noisy_sites(notes, truth),
        "failures": failures(history),
        "seconds": math.fsum(v for v in spent if not math.isnan(v)) if seconds is None else seconds,
        "versions": versions(),
    }
