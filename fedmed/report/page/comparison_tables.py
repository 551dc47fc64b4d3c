"""The tables of a comparison: means, differences, fairness, values by seed, all settings, findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedmed.report.page import comparison_runs as runs
from fedmed.report.page.comparison_data import (
    Comparison,
    interval,
    probability,
    signed,
    site_scores,
    smaller_is_better,
    verdict,
)
from fedmed.report.page.parts import Block, Cell, Row, Table, rows_of
from fedmed.report.tables import show
from fedmed.report.values import mean, number, spread, worst

Setting = Mapping[str, Any]


def means(comparison: Comparison, setting: Setting) -> Table:
    """Arms by metrics: mean and standard deviation over the seeds."""
    rows = []
    alone = len(comparison.arms(setting)) < 2  # nobody to be better than
    for arm in comparison.arms(setting):
        cells: list[Cell | str] = [arm]
        for metric in comparison.metrics:
            result = comparison.result(setting, arm, metric)
            deviation = number(result.get("sd"))
            text = show(number(result.get("mean"))) + ("" if math.isnan(deviation) else f" ± {show(deviation)}")
            values = [number(v) for v in (result.get("values") or {}).values()]
            known = sum(not math.isnan(v) for v in values)
            text += f" ({known} of {len(values)})" if 0 < known < len(values) else ""
            mark = "best" if result.get("best") and not alone else "tied" if result.get("tied") else ""
            cells.append(Cell(f"{text} {mark}".strip() if mark else text, mark))
        rows.append(Row(cells, comparison.numbers[arm]))
    header = ["arm", *(f"{m} (lower is better)" if smaller_is_better(m) else m for m in comparison.metrics)]
    note = "Mean ± standard deviation over the seeds; (2 of 3): so many of them have a value. Tied: the paired difference from the best has 0 in its interval."
    return Table("Means over the seeds", header, rows, note)


def differences(comparison: Comparison, setting: Setting) -> list[Block]:
    """Differences from the baseline, a row per arm and metric; [] without any."""
    rows = []
    for arm in comparison.arms(setting):
        for metric in comparison.metrics:
            gap = comparison.result(setting, arm, metric).get("difference")
            if not isinstance(gap, Mapping):
                continue
            said = verdict(gap, metric)
            score = "/".join(str(gap.get(key, "-")) for key in ("wins", "ties", "losses"))
            per = str(gap.get("per") or "").replace("seed x site", "seed and site")
            tested = [
                f"{gap.get('pairs', '-')} by {per}" if per else str(gap.get("pairs", "-")),
                score,
                probability(gap),
            ]
            seeds, missing = gap.get("seeds"), gap.get("missing")
            of_all = f" ({seeds} of {seeds + missing})" if seeds and missing else ""
            cells: list[Cell | str] = [arm, metric, f"{signed(gap.get('mean'))}{of_all}", interval(gap)]
            cells.append(Cell(said, {"better": "best", "worse": "bad"}.get(said, "")))
            rows.append(Row([*cells, *tested], comparison.numbers[arm]))
    header = ["arm", "metric", "difference", "95 % interval", "says", "pairs", "win/tie/loss", "p"]
    note = (
        "p: Wilcoxon's signed-rank test over the pairs (adjusted by Holm over the arms where the file says so). Sites of one seed "
        "share a model, so p over seeds and sites is too small rather than too large."
    )
    return [Table(f"Differences from {comparison.baseline}", header, rows, note)] if rows else []


def fairness(comparison: Comparison, setting: Setting) -> list[Block]:
    """Worst site and spread of every arm, averaged over the seeds; conditions where the runs were scored under them."""
    metric, rows = comparison.metric, []
    conditions = {arm: runs.conditions(comparison, setting, arm) for arm in comparison.arms(setting)}
    names = list(dict.fromkeys(name for found in conditions.values() for name in found))
    for arm in comparison.arms(setting):
        scores = site_scores(comparison, setting, arm)
        if not scores and not conditions[arm]:
            continue
        middle = mean(mean(by_site.values()) for by_site in scores)
        lowest = mean(worst(metric, by_site.values()) for by_site in scores)
        apart = mean(spread(by_site.values()) for by_site in scores)
        cells = [show(middle), show(lowest), show(apart)]
        rows.append(Row([arm, *cells, *(show(conditions[arm].get(name)) for name in names)], comparison.numbers[arm]))
    more = [f"{name} test" if name != "gap" else "gap of conditions" for name in names]
    header = ["arm", "mean of sites", "worst site", "spread", *more]
    return [Table(f"Fairness of the arms in {metric}, averaged over the seeds", header, rows)] if rows else []


def by_seed(comparison: Comparison, setting: Setting) -> Table:
    """The value of every run, arms and metrics by seeds."""
    rows = []
    for arm in comparison.arms(setting):
        for metric in comparison.metrics:
            values = {str(s): v for s, v in (comparison.result(setting, arm, metric).get("values") or {}).items()}
            if values:
                rows.append(
                    Row(
                        [arm, metric, *(show(number(values.get(str(s)))) for s in comparison.seeds)],
                        comparison.numbers[arm],
                    )
                )
    return Table("Values by seed", ["arm", "metric", *(f"seed {s}" for s in comparison.seeds)], rows)


def overall(comparison: Comparison) -> list[Block]:
    """Settings in which each arm is better, not shown to differ, worse; [] for a single setting."""
    if len(comparison.settings) < 2:
        return []
    rows = [
        Row(
            [str(c["arm"]), str(c["metric"]), *(show(c.get(key)) for key in ("wins", "ties", "losses"))],
            comparison.numbers.get(str(c["arm"])),
        )
        for c in comparison.doc.get("win_tie_loss", [])
    ]
    header = ["arm", "metric", "better", "no difference shown", "worse"]
    return (
        [Table(f"Settings in which an arm is better or worse than {comparison.baseline}", header, rows)] if rows else []
    )


def findings(comparison: Comparison) -> list[Block]:
    """What the methods noticed, a table per setting."""
    found: list[Block] = []
    for setting in comparison.settings:
        own = [f for f in comparison.doc.get("findings", []) if str(f.get("setting")) == str(setting["name"])]
        if own:
            columns = [str(c) for c in own[0].get("columns", [])]
            rows = [[str(f.get("arm")), str(f.get("seed")), *map(str, f.get("cells", []))] for f in own]
            title = str(setting.get("title") or setting["name"])
            found.append(Table(title, ["arm", "seed", *columns], rows_of(rows, series=comparison.numbers)))
    return found
