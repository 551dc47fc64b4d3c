"""From the run folders of a plan to the numbers of `comparison.json`: results, wins and losses over the settings, findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedmed.compare.findings import cells_of, columns_of
from fedmed.compare.statistics import compare, outcome
from fedmed.compare.values import check_known, finished, site_values, smaller_is_better, value_of
from fedmed.files import json_ready


class PlannedSetting(Protocol):
    """What the numbers need to know of a setting."""

    @property
    def name(self) -> str:
        """Folder of its runs."""

    @property
    def arms(self) -> Sequence[str]:
        """Arms that are run in it; the baseline may be missing, see `against`."""

    @property
    def seeds(self) -> Sequence[int]:
        """Seeds of its runs."""


class Plan(Protocol):
    """What the numbers need to know of a comparison."""

    @property
    def metrics(self) -> Sequence[str]:
        """The first judges."""

    @property
    def last_rounds(self) -> int:
        """Evaluations a value is the mean of."""

    @property
    def baseline(self) -> str:
        """The arm all others are compared with."""

    @property
    def findings(self) -> Sequence[str]:
        """Names of `fedmed.compare.findings.FINDINGS`."""

    @property
    def settings(self) -> Sequence[PlannedSetting]:
        """In the order of the tables."""

    def folder(self, setting: str, arm: str, seed: int) -> Path:
        """Run folder; of the setting named by `against` where the baseline is not run in this one."""


def results(plan: Plan) -> dict[str, Any]:
    """Read all runs of a plan: {"results": [...], "win_tie_loss": [...], "findings": [...]}, ready for JSON (undefined: None).

    Runs that are missing or have not finished count as undefined. Raises `UserError` for a metric or finding that does not exist.
    """
    columns = columns_of(plan.findings)
    rows: list[dict[str, Any]] = []
    findings: list[dict[str, Any]] = []
    folders: dict[Path, None] = {}
    for setting in plan.settings:
        runs = {arm: {s: plan.folder(setting.name, arm, s) for s in setting.seeds} for arm in shown_arms(plan, setting)}
        folders |= {folder: None for by_seed in runs.values() for folder in by_seed.values()}
        rows += of_setting(plan, setting.name, runs)
        for arm, by_seed in runs.items():
            if columns and arm != plan.baseline:
                findings += [
                    {
                        "setting": setting.name,
                        "arm": arm,
                        "seed": s,
                        "columns": columns,
                        "cells": cells_of(plan.findings, f),
                    }
                    for s, f in by_seed.items()
                ]
    empty = [m for m in plan.metrics if all(math.isnan(row["mean"]) for row in rows if row["metric"] == m)]
    check_known(empty, list(folders), all(map(finished, folders)))
    found = {"results": rows, "win_tie_loss": win_tie_loss(rows), "findings": findings}
    ready: dict[str, Any] = json_ready(found)
    return ready


def shown_arms(plan: Plan, setting: PlannedSetting) -> list[str]:
    """Arms of a setting's tables: the baseline first, wherever it was run."""
    return [plan.baseline, *(arm for arm in setting.arms if arm != plan.baseline)]


def of_setting(plan: Plan, setting: str, runs: Mapping[str, Mapping[int, Path]]) -> list[dict[str, Any]]:
    """One entry per arm and metric, arms in the order of `runs` (arm -> seed -> run folder)."""
    last = plan.last_rounds
    values: dict[str, dict[str, dict[int, float]]] = {m: {arm: {} for arm in runs} for m in plan.metrics}
    sites: dict[str, dict[str, dict[int, dict[str, float]]]] = {m: {arm: {} for arm in runs} for m in plan.metrics}
    for arm, by_seed in runs.items():
        for seed, folder in by_seed.items():  # folder by folder: a history is read once for all metrics
            for metric in plan.metrics:
                values[metric][arm][seed] = value_of(folder, metric, last)
                sites[metric][arm][seed] = site_values(folder, metric, last)
    compared = {m: compare(values[m], sites[m], plan.baseline, smaller_is_better(m)) for m in plan.metrics}
    return [
        {
            "setting": setting,
            "arm": arm,
            "metric": metric,
            "values": values[metric][arm],
            "sites": {seed: scores for seed, scores in sites[metric][arm].items() if scores},
            **compared[metric][arm],
        }
        for arm in runs
        for metric in plan.metrics
    ]


def win_tie_loss(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Count for every arm but the baseline and every metric the settings that are won, tied and lost.

    Won: the interval of the difference lies on the good side of 0; lost: on the bad side; a setting without any pair of
    seeds does not count, one with a single pair is tied.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        found = row["difference"]
        if found is None:
            continue
        count = counts.setdefault((row["arm"], row["metric"]), [0, 0, 0])
        if found["seeds"]:
            count[1 - outcome(found["low"], found["high"], smaller_is_better(row["metric"]))] += 1
    return [
        {"arm": arm, "metric": metric, "wins": wins, "ties": ties, "losses": losses}
        for (arm, metric), (wins, ties, losses) in counts.items()
    ]
