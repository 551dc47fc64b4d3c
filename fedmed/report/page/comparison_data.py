"""A comparison as the page reads it: comparison.json with its runs, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmed.errors import UserError
from fedmed.files import Record, read_history
from fedmed.report.tables import show
from fedmed.report.values import curve, mean_curve, number
from fedmed.schema import lower_is_better

Lines = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Comparison:
    """comparison.json of a folder. A setting is its entry in `settings`."""

    folder: Path
    doc: Mapping[str, Any]

    @property
    def settings(self) -> Sequence[Mapping[str, Any]]:
        """In the order of the file."""
        found: Sequence[Mapping[str, Any]] = self.doc.get("settings", [])
        return found

    @property
    def metrics(self) -> list[str]:
        """The first judges."""
        return [str(m) for m in self.doc.get("metrics", [])]

    @property
    def metric(self) -> str:
        """The one that judges, "" for a comparison without metrics."""
        return self.metrics[0] if self.metrics else ""

    @property
    def baseline(self) -> str:
        """The arm all others are compared with."""
        return str(self.doc.get("baseline", ""))

    @property
    def seeds(self) -> list[int]:
        """Seeds of all settings."""
        return [int(s) for s in self.doc.get("seeds", [])]

    @cached_property
    def _results(self) -> dict[tuple[str, str, str], Mapping[str, Any]]:
        return {(str(r["setting"]), str(r["arm"]), str(r["metric"])): r for r in self.doc.get("results", [])}

    @cached_property
    def cells(self) -> dict[tuple[str, str, int], Mapping[str, Any]]:
        """(setting, arm, seed) -> its run."""
        return {(str(c["setting"]), str(c["arm"]), int(c["seed"])): c for c in self.doc.get("cells", [])}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Arm -> number of its series in every figure: the baseline first, the others as they come."""
        arms = dict.fromkeys([self.baseline] if self.baseline else [])
        arms.update(dict.fromkeys(arm for setting in self.settings for arm in self.arms(setting)))
        return {arm: place for place, arm in enumerate(arms)}

    def arms(self, setting: Mapping[str, Any]) -> list[str]:
        """Arms that have results or runs in a setting, the baseline first."""
        name = str(setting["name"])
        found = [arm for where, arm, _ in self._results if where == name] + [str(a) for a in setting.get("arms", [])]
        return sorted(dict.fromkeys(found), key=lambda arm: arm != self.baseline)

    def result(self, setting: Mapping[str, Any], arm: str, metric: str) -> Mapping[str, Any]:
        """The entry of `results`, {} if there is none."""
        return self._results.get((str(setting["name"]), arm, metric), {})

    def run_folder(self, setting: Mapping[str, Any], arm: str, seed: int) -> Path | None:
        """Folder of a finished run; of the setting it is compared `against` where the arm was not run in this one."""
        for name in (setting["name"], setting.get("against")):
            cell = self.cells.get((str(name), arm, seed))
            if cell is None or cell.get("state") != "done":
                continue
            folder = Path(str(cell.get("folder", "")))
            if not folder.is_absolute() and ".." not in folder.parts:  # a comparison has its runs inside it
                return self.folder / folder
        return None

    def histories(self, setting: Mapping[str, Any], arm: str) -> list[Sequence[Record]]:
        """Records of the finished runs of an arm, by seed; what cannot be read is left out."""
        found: list[Sequence[Record]] = []
        for seed in self.seeds:
            folder = self.run_folder(setting, arm, seed)
            try:
                found += [read_history(folder)] if folder is not None else []
            except UserError:
                continue
        return found


def smaller_is_better(metric: str) -> bool:
    """Whether small values of a metric of a comparison are good: distances, losses, and how far apart things lie."""
    kind, _, name = metric.rpartition(":")
    return kind == "gap" or (kind, name) == ("subsets", "spread") or lower_is_better(name)


def curve_keys(metric: str) -> list[tuple[str, str]]:
    """Where the records may hold a metric of a comparison, best first, as (phase, full name); [] for one that is no curve."""
    kind, _, rest = metric.rpartition(":")
    split, _, name = rest.rpartition("/")
    common = [("central", f"{split or 'test'}/global/{name}"), ("evaluate", f"{split or 'test'}/global/{name}")]
    own = [("evaluate", f"test/personal/{name}")]
    if kind in ("S", "personal"):
        return own
    return [*common, *own] if kind in ("", "G", "mean", "gap", "global") and name else []


def arm_curves(comparison: Comparison, setting: Mapping[str, Any], metric: str) -> tuple[str, dict[str, Lines]]:
    """What is drawn over the rounds for a metric, in words, and arm -> seed's place -> curve; ("", {}) where there is none.

    Every arm is read in the same way, arms without a curve are left out. A gap or a mean over conditions is shown by the plain test items.
    """
    histories = {arm: comparison.histories(setting, arm) for arm in comparison.arms(setting)}
    for phase, key in curve_keys(metric):
        found: dict[str, Lines] = {}
        for arm, runs in histories.items():
            lines = {str(place): mean_curve(curve(records, key, phase)) for place, records in enumerate(runs)}
            lines = {place: line for place, line in lines.items() if line}
            if lines:
                found[arm] = lines
        if found:
            split, view, name = key.split("/", 2)
            where = "pooled test items" if phase == "central" else "mean of sites"
            condition = f", {split.removeprefix('test-')}" if split != "test" else ""
            return f"{name}, {where}{condition}{', own models' if view == 'personal' else ''}", found
    return "", {}


def signed(value: Any) -> str:
    """A difference with its sign, "-" where it is undefined."""
    found = number(value)
    return "-" if math.isnan(found) else f"{found:+.3f}"


def interval(gap: Mapping[str, Any]) -> str:
    """The interval of a difference, "-" where there is none."""
    low, high = number(gap.get("low")), number(gap.get("high"))
    return "-" if math.isnan(low) or math.isnan(high) else f"{low:+.3f} to {high:+.3f}"


def probability(gap: Mapping[str, Any]) -> str:
    """The p-value of a difference, adjusted where the file has that."""
    p = number(gap.get("p_holm", gap.get("p")))
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(gap: Mapping[str, Any], metric: str) -> str:
    """better or worse where the interval excludes 0, else "no difference shown"; "" where nothing can be said."""
    middle, low, high = (number(gap.get(key)) for key in ("mean", "low", "high"))
    if math.isnan(middle):
        return ""
    if math.isnan(low) or math.isnan(high):
        return "one pair shows no more than a direction"
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (middle < 0) == smaller_is_better(metric) else "worse"


def sentences(comparison: Comparison, setting: Mapping[str, Any]) -> list[str]:
    """What a setting shows in the metric that judges, one sentence per arm."""
    metric, found = comparison.metric, []
    base = comparison.result(setting, comparison.baseline, metric)
    said = f"{comparison.baseline} reaches {metric} {show(number(base.get('mean')))}"
    for arm in comparison.arms(setting):
        result = comparison.result(setting, arm, metric)
        gap = result.get("difference")
        if arm == comparison.baseline or not result:
            continue
        middle = show(number(result.get("mean")))
        if not isinstance(gap, Mapping) or not verdict(gap, metric):
            found.append(f"{arm} {middle}: not compared.")
            continue
        range_ = interval(gap)
        between = f", interval {range_}" if range_ != "-" else ""
        found.append(f"{arm} {middle}: {signed(gap.get('mean'))}{between}; {verdict(gap, metric)}.")
    return [f"{said}.", *found] if base else found or ["No run of this setting has finished."]


def site_scores(comparison: Comparison, setting: Mapping[str, Any], arm: str) -> list[dict[str, float]]:
    """Scores of the sites in the judging metric, a mapping per seed; [] where the sites were not scored."""
    sites = comparison.result(setting, arm, comparison.metric).get("sites") or {}
    scores = [{str(site): number(value) for site, value in by_site.items()} for by_site in sites.values()]
    return [by_site for by_site in scores if not all(math.isnan(v) for v in by_site.values())]
