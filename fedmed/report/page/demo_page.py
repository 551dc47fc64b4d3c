"""The folder of `fedmed demo` as a comparison of one setting and one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmed.report.page.comparison_data import smaller_is_better
from fedmed.report.values import mean, number, tail

LAST = 3  # evaluations that count, as in the sentence of the demo


def demo_comparison(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The content a comparison.json of the demo would have; differences have no interval, since there is one seed."""
    arms: Mapping[str, Mapping[str, Any]] = summary["arms"]
    first: Mapping[str, Any] = next(iter(arms.values()), {})
    metric, seed = str(first.get("main_metric") or ""), int(first.get("seed") or 0)
    values = {arm: _value(folder / arm, found, metric) for arm, found in arms.items()}
    base = next(iter(arms), "")
    defined = [v for v in values.values() if not math.isnan(v)]
    best = (min if smaller_is_better(metric) else max)(defined, default=math.nan)
    notes = [str(line) for line in summary.get("not_shared", [])]
    said = [str(summary["comparison"])] if summary.get("comparison") else []
    return {
        "kind": "comparison", "name": folder.name, "variant": "", "description": " ".join([*said, *(f"Not shared: {n}." for n in notes)]),
        "data": "", "engine": str(first.get("engine") or ""), "command": "", "metrics": [metric] if metric else [],
        "last_rounds": LAST, "baseline": base, "seeds": [seed], "versions": dict(first.get("versions", {})),
        "settings": [{"name": "demo", "title": " against ".join(arms), "arms": list(arms), "against": None}],
        "cells": [
            {"setting": "demo", "arm": arm, "seed": seed, "folder": arm, "state": "done", "seconds": found.get("seconds")}
            for arm, found in arms.items()
        ],
        "results": [_result(arm, found, metric, seed, values, base, best) for arm, found in arms.items()] if metric else [],
    }  # fmt: skip


def _value(folder: Path, summary: Mapping[str, Any], metric: str) -> float:
    """The mean over the last evaluations on the central test set, else over the sites; NaN where the records are gone."""
    from fedmed.errors import UserError
    from fedmed.files import read_history

    key = f"{summary.get('judged_by')}/{metric}"
    try:
        history = read_history(folder)
    except UserError:
        return math.nan
    return mean(tail(history, key, "central", LAST) or tail(history, key, "evaluate", LAST))


def _result(
    arm: str, summary: Mapping[str, Any], metric: str, seed: int, values: Mapping[str, float], base: str, best: float
) -> dict[str, Any]:
    gain = values[arm] - values.get(base, math.nan)
    sites = {site: number(found.get(metric)) for site, found in summary.get("sites", {}).items()}
    return {
        "setting": "demo", "arm": arm, "metric": metric, "values": {str(seed): values[arm]}, "sites": {str(seed): sites},
        "mean": values[arm], "sd": None, "best": values[arm] == best, "tied": False,
        "difference": None if arm == base else {"mean": gain},
    }  # fmt: skip
