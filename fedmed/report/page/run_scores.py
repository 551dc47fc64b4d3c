"""How good a run is, and for whom: curves, fairness over the sites, conditions, subsets of modalities, both views."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedmed.report import figures, tables
from fedmed.report.fairness import CLEAN, condition_keys
from fedmed.report.page import plots
from fedmed.report.page.parts import Beside, Block, Facts, Figure, Figures, Fold, Table, Text, rows_of
from fedmed.report.page.run_data import RunData
from fedmed.report.tables import clock, show
from fedmed.report.values import curve, number, of_phase

NO_FIGURES = "Figures are left out: they need matplotlib (pip install 'fedmed[report]')."


def legend_of(run: RunData) -> list[tuple[int, str]]:
    """What the lines of the figures stand for; [] where there are too many to be told apart."""
    return [(number_, site) for site, number_ in run.sites.items()] if len(run.sites) > 1 else []


def sentence(run: RunData) -> str:
    """The run in one sentence and the result in another."""
    summary, rounds = run.summary, run.summary.get("rounds", 0)
    planned = run.setting("federation.rounds", rounds)
    what = f"{summary.get('name')}: {len(run.sites)} sites, {rounds} rounds" + (
        f" of {planned}" if planned != rounds else ""
    )
    if run.key is None:
        return f"{what}. Nothing was evaluated."
    lowest = summary.get("fairness", {}).get("sites", {}).get("worst_site")
    central = number((summary.get("central", {}).get("last") or {}).get(run.key))
    pooled = "" if math.isnan(central) else f"; central test {show(central)}"
    return (
        f"{what}. {run.metric} is {show(number(summary.get('mean')))} on average over the sites and "
        f"{show(number(summary.get('worst')))} at the worst{f', {lowest}' if lowest else ''}{pooled}."
    )


def overview(run: RunData) -> list[Block]:
    """The first section: what it was and what came out."""
    summary = run.summary
    central = number((summary.get("central", {}).get("last") or {}).get(run.key or ""))
    pairs = [
        ("experiment", str(summary.get("name"))),
        ("judged by", f"{run.metric} ({summary.get('judged_by')})" if run.key else "nothing"),
        ("mean of sites", show(number(summary.get("mean")))),
        ("worst site", tables.worst_site(summary)),
        ("spread", show(number(summary.get("spread")))),
        ("central test", show(central)),
        ("rounds", show(summary.get("rounds"))),
        ("time", clock(number(summary.get("seconds")))),
        ("engine", str(summary.get("engine"))),
        ("seed", show(summary.get("seed"))),
    ]
    found: list[Block] = [Text(sentence(run), "lead")]
    description = str(run.setting("description", ""))
    found += [Text(description)] if description else []
    if not run.finished:
        found.append(Text("This run has not finished: the numbers are those of its records so far.", "warn"))
    selected = (summary.get("selected") or {}) if isinstance(summary.get("selected"), Mapping) else {}
    if selected:
        pairs.append(
            (
                "chosen on validation",
                f"round {selected.get('round')} ({selected.get('metric')} {show(number(selected.get('value')))})",
            )
        )
    note = "Values of the last evaluation. Spread: best minus worst site. A dash: undefined or not measured."
    return [*found, Facts(pairs), Text(note, "note")]


def curve_blocks(run: RunData) -> list[Block]:
    """Training loss and judging metric over the rounds."""
    loss = curve(run.history, "train_loss", "train")
    scores = curve(run.history, run.key) if run.key else {}
    central = central_lines(run)
    if not loss and not scores and not central:
        return [Text("Nothing was recorded that could be drawn.")]
    if not figures.available():
        return [Text(NO_FIGURES, "warn"), _ends_table(run, loss, scores)]
    drawn: list[Figure] = []
    numbers = {**run.sites, **{s: len(run.sites) + i for i, s in enumerate(sorted({*loss, *scores} - set(run.sites)))}}
    if loss:
        drawn.append(plots.curves("loss", "training loss", loss, numbers))
    if scores or central:
        drawn.append(plots.curves("metric", run.metric, scores, numbers, central))
    return [Figures(drawn, legend_of(run)), Fold("The ends of the curves as numbers", [_ends_table(run, loss, scores)])]


def _ends_table(run: RunData, loss: plots.Lines, scores: plots.Lines) -> Table:
    """First and last values of the curves: what the figures show, as numbers."""
    names = sorted({*loss, *scores})

    def ends(line: plots.Line) -> list[str]:
        """First and last defined value."""
        known = [line[r] for r in sorted(line) if not math.isnan(line[r])]
        return [show(known[0]), show(known[-1])] if known else ["-", "-"]

    rows = [[site, *ends(loss.get(site, {})), *ends(scores.get(site, {}))] for site in names]
    header = ["site", "loss, first", "loss, last", f"{run.metric or 'metric'}, first", "last"]
    return Table("First and last values of the curves", header, rows_of(rows, series=run.sites))


def central_lines(run: RunData) -> dict[str, dict[int, float]]:
    """Curves on the central test items: clean, then each condition; {} without such."""
    if run.key is None:
        return {}
    names = (name for r in of_phase(run.history, "central") for name in r.get("metrics", {}))
    keys = condition_keys(names, run.metric)
    keys = keys if keys.get(CLEAN) == run.key else {CLEAN: run.key}
    lines = {name: curve(run.history, key, "central").get("central", {}) for name, key in keys.items()}
    return {name: line for name, line in lines.items() if line}


def fairness_blocks(run: RunData) -> list[Block]:
    """Sites beside each other: who is worst, how far apart, and conditions where they were scored."""
    summary = run.summary
    if not summary.get("sites"):
        return [Text("No site was scored.")]
    header, rows, _ = tables.site_table(summary)
    table = Table("Last evaluation of each site", header, rows_of(rows, 3, run.sites))
    sites = summary.get("fairness", {}).get("sites", {})
    pairs = [
        ("worst site", tables.worst_site(summary)),
        ("spread", show(number(summary.get("spread")))),
        ("standard deviation", show(number(sites.get("std")))),
    ]
    groups = {name: number(v) for name, v in sites.get("by_group", {}).items()}
    if groups and not any(math.isnan(v) for v in groups.values()):
        pairs += [(f"mean of {name} sites", show(value)) for name, value in groups.items()]
        pairs.append(("gap between them", show(number(sites.get("group_gap")))))
    found: list[Block] = [Facts(pairs)]
    scores = dict(sorted(run.scores.items()))
    beside: list[Block] = [table]
    if figures.available() and any(not math.isnan(v) for v in scores.values()) and len(scores) <= 60:
        mean = number(summary.get("mean"))
        beside.insert(0, Figures([plots.bars("bars", run.metric, scores, run.sites, run.noisy, mean)]))
    return [*found, Beside(beside)]


def condition_blocks(run: RunData) -> list[Block]:
    """Clean against degraded items, subsets of modalities, global against personal; [] where nothing of it was measured."""
    summary: Mapping[str, Any] = run.summary
    found: list[Block] = []
    header, rows = tables.fairness_table(summary)
    if rows:
        found.append(Table("Clean and corrupted", header, rows_of(rows), "Gap: the best minus the worst of them."))
    header, rows = tables.subset_table(summary)
    if rows:
        found.append(Table("Subsets of the modalities", header, rows_of(rows, 3)))
    for caption, make in (
        ("Global and personal view", tables.pair_table),
        ("Both views at each site", tables.personal_table),
    ):
        header, rows = make(summary)
        if rows:
            found.append(Table(caption, header, rows_of(rows, series=run.sites)))
    origin = tables.personal_origin(summary)
    return [*found, Text(f"{origin}.", "note")] if origin else found
