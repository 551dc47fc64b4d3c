"""The page about a comparison: what it says, a section per setting, then the runs and how to repeat them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmed.report import figures
from fedmed.report.page import comparison_plots as plots
from fedmed.report.page import comparison_runs as runs
from fedmed.report.page import comparison_tables as tables
from fedmed.report.page.comparison_data import Comparison, arm_curves, sentences, site_scores, smaller_is_better
from fedmed.report.page.parts import Block, Facts, Figure, Figures, Fold, Group, Page, Section, Text, has_pictures
from fedmed.report.page.run_scores import NO_FIGURES
from fedmed.report.values import mean, number, spread, worst

Setting = Mapping[str, Any]


def comparison_page(folder: Path, doc: Mapping[str, Any], images: bool) -> Page:
    """The page about the comparison in a folder; `doc` is its comparison.json."""
    comparison = Comparison(folder, doc)
    kept = runs.run_folds(comparison, images)
    sections = [Section("summary", "Summary", summary(comparison))]
    sections += [
        Section(
            f"setting-{place}",
            str(setting.get("title") or setting["name"]),
            of_setting(comparison, setting, place, kept),
        )
        for place, setting in enumerate(comparison.settings, start=1)
    ]
    for name, title, blocks in (
        ("overall", "Over all settings", tables.overall(comparison)),
        ("findings", "What the methods found out", tables.findings(comparison)),
        ("runs", "One run of each arm", runs.run_blocks(comparison, kept, images)),
        ("cost", "Cost", runs.cost_blocks(comparison)),
        ("commands", "Runs and commands", runs.command_blocks(comparison)),
    ):
        sections += [Section(name, title, blocks)] if blocks else []
    variant = str(doc.get("variant") or "")
    subtitle = f"Comparison{f', variant {variant}' if variant else ''}: {len(comparison.numbers)} arms, {len(comparison.seeds)} seeds"
    patients = any(has_pictures(section.blocks) for section in sections)
    return Page(str(doc.get("name") or folder.name), subtitle, sections, patients)


def summary(comparison: Comparison) -> list[Block]:
    """What was compared and what every setting shows."""
    doc, cells = comparison.doc, list(comparison.cells.values())
    states = [str(cell.get("state")) for cell in cells]
    pairs = [
        ("judged by", comparison.metric + (" (lower is better)" if smaller_is_better(comparison.metric) else "")),
        ("baseline", comparison.baseline),
        ("arms", str(len(comparison.numbers))),
        ("settings", str(len(comparison.settings))),
        ("seeds", ", ".join(map(str, comparison.seeds)) or "-"),
        ("data", str(doc.get("data") or "each site's own")),
        ("engine", str(doc.get("engine") or "-")),
        ("runs", f"{states.count('done')} of {len(cells)}"),
    ]
    found: list[Block] = [Text(str(doc["description"]))] if doc.get("description") else []
    if len(comparison.seeds) == 1:
        found.append(
            Text("One seed per arm: a difference can be chance. Repeat it with more seeds before believing it.", "warn")
        )
    failed = states.count("failed")
    if failed:
        words = "1 run has failed; it is" if failed == 1 else f"{failed} runs have failed; they are"
        found.append(Text(f"{words} named under Runs and commands.", "warn"))
    for setting in comparison.settings:
        title = str(setting.get("title") or setting["name"])
        found.append(Group(title, [Text(sentence) for sentence in sentences(comparison, setting)]))
    last = doc.get("last_rounds")
    note = f"A value is the mean over the last {last} evaluations of a run. " if last else ""
    note += f"Differences are from {comparison.baseline}, paired by seed, with the 95 % interval of their mean."
    return [*found, Facts(pairs), Text(note, "note")]


def of_setting(comparison: Comparison, setting: Setting, place: int, kept: runs.Kept) -> list[Block]:
    """Sentences, figures and tables of one setting."""
    found: list[Block] = [Text(" ".join(sentences(comparison, setting)), "lead")]
    if setting.get("against"):
        found.append(Text(f"The baseline is that of the setting {setting['against']}.", "note"))
    if figures.available():
        drawn = setting_figures(comparison, setting, f"s{place}")
        legend = [(number_, arm) for arm, number_ in comparison.numbers.items() if arm in comparison.arms(setting)]
        found += [Figures(drawn, legend)] if drawn else []
    else:
        found.append(Text(NO_FIGURES, "warn"))
    found += [
        tables.means(comparison, setting),
        *tables.differences(comparison, setting),
        *tables.fairness(comparison, setting),
    ]
    found.append(Fold("By seed", [tables.by_seed(comparison, setting)]))
    return [*found, *runs.links(comparison, setting, kept)]


def setting_figures(comparison: Comparison, setting: Setting, name: str) -> list[Figure]:
    """Forest, seeds, curves, sites: those for which there is something to draw."""
    metric, numbers = comparison.metric, comparison.numbers
    arms = comparison.arms(setting)
    results = {arm: comparison.result(setting, arm, metric) for arm in arms}
    gaps = {arm: r["difference"] for arm, r in results.items() if isinstance(r.get("difference"), Mapping)}
    values = {arm: r.get("values") or {} for arm, r in results.items() if r}
    found = []
    if any(not math.isnan(number(gap.get("mean"))) for gap in gaps.values()):
        found.append(plots.forest(f"{name}-forest", metric, gaps, numbers, comparison.baseline, widest(comparison)))
    if any(not math.isnan(number(v)) for by_seed in values.values() for v in by_seed.values()):
        found.append(plots.dots(f"{name}-seeds", metric, values, numbers))
    shown, curves = arm_curves(comparison, setting, metric)
    if curves:
        found.append(plots.arm_lines(f"{name}-curves", shown, curves, numbers))
    ranges = {arm: _range(metric, scores) for arm in arms if (scores := site_scores(comparison, setting, arm))}
    if ranges:
        found.append(plots.site_ranges(f"{name}-sites", metric, ranges, numbers))
    return found


def widest(comparison: Comparison) -> float:
    """The largest distance from 0 that any interval of the judging metric reaches: all settings share their scale."""
    gaps = [
        comparison.result(s, arm, comparison.metric).get("difference") or {}
        for s in comparison.settings
        for arm in comparison.arms(s)
    ]
    ends = [abs(number(gap.get(key))) for gap in gaps for key in ("low", "mean", "high")]
    return max((end for end in ends if not math.isnan(end)), default=0.0)


def _range(metric: str, seeds: list[dict[str, float]]) -> tuple[float, float, float]:
    """(worst, mean, best) site, each averaged over the seeds."""
    lowest = [worst(metric, scores.values()) for scores in seeds]
    reach = [spread(scores.values()) for scores in seeds]
    sign = -1.0 if smaller_is_better(metric) else 1.0
    best = [low + sign * wide for low, wide in zip(lowest, reach, strict=True)]
    return mean(lowest), mean(mean(scores.values()) for scores in seeds), mean(best)
