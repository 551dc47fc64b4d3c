"""What the server rule found out about the sites, and how much it trusted each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedmed.report import figures, tables
from fedmed.report.page import plots
from fedmed.report.page.parts import Beside, Block, Cell, Facts, Figures, Row, Table, Text, rows_of
from fedmed.report.page.recipe import shown_fact
from fedmed.report.page.run_data import RunData
from fedmed.report.page.run_scores import legend_of
from fedmed.report.tables import show
from fedmed.report.values import number, of_phase


def identification(run: RunData, by_site: bool = True) -> list[Block]:
    """Sites believed noisy against those that are; [] where the rule says nothing and nothing is known. `by_site`: with the list."""
    found = run.summary.get("noisy_sites", {})
    said = "believed_noisy" in run.summary.get("notes", {})
    known = any("is_noisy" in info for info in run.summary.get("truth", {}).values())
    if not said and not known:
        return []
    believed, true = set(found.get("believed", ())), set(found.get("true", ()))
    blocks: list[Block] = []
    if said and known:
        blocks += [_matrix(run, believed, true), Facts(_rates(found)), Text(_RATES, "note")]
    elif known:
        blocks.append(Text("The rule does not say which sites it believes noisy.", "note"))
    else:
        blocks.append(Text("Which sites are corrupted is not known here.", "note"))
    return [*blocks, _site_list(run, believed, true, said, known)] if by_site else blocks


_RATES = (
    "Precision: the share of the sites believed noisy that are. Recall: the share of the noisy sites that were found."
)


def _rates(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("precision", show(number(found.get("precision")), 2)),
        ("recall", show(number(found.get("recall")), 2)),
    ]


def _matrix(run: RunData, believed: set[str], true: set[str]) -> Table:
    """Two by two: numbers of sites."""
    names = set(run.sites)
    counts = [
        [len(names & truth & belief) for belief in (believed, names - believed)] for truth in (true, names - true)
    ]
    rows = [
        Row([label, *(Cell(str(v), "best" if i == j else "") for j, v in enumerate(line))])
        for i, (label, line) in enumerate(zip(("truly noisy", "truly clean"), counts, strict=True))
    ]
    return Table("Sites by truth and by what the rule believes", ["", "believed noisy", "believed clean"], rows)


def _site_list(run: RunData, believed: set[str], true: set[str], said: bool, known: bool) -> Table:
    truth = run.summary.get("truth", {})
    facts = list(
        dict.fromkeys(
            k for info in truth.values() for k, v in info.items() if k != "is_noisy" and shown_fact(v) is not None
        )
    )
    header = [
        "site",
        *(["truth"] if known else []),
        *(["believed"] if said else []),
        *(f.replace("_", " ") for f in facts),
    ]
    rows = []
    for site, place in run.sites.items():
        right = (site in true) == (site in believed)
        cells: list[Cell | str] = [site]
        cells += ["noisy" if site in true else "clean"] if known else []
        if said:
            mark = "" if not known else "best" if right else "bad"
            cells.append(Cell(("noisy" if site in believed else "clean") + (", wrong" if mark == "bad" else ""), mark))
        cells += [shown_fact(truth.get(site, {}).get(key)) or "-" for key in facts]
        rows.append(Row(cells, place))
    return Table("Each site", header, rows)


def weight_lines(run: RunData) -> tuple[dict[str, dict[int, float]], str]:
    """Weight of each site over the rounds as the rule noted it, else the share of its items; and what the lines are called."""
    lines: dict[str, dict[int, float]] = {}
    for record in of_phase(run.history, "server"):
        noted = record.get("metrics", {}).get("weights")
        if isinstance(noted, Mapping):
            for site, value in noted.items():
                lines.setdefault(str(site), {})[int(record["round"])] = number(value)
    if lines:
        return lines, "weight in the new model"
    rounds: dict[int, dict[str, float]] = {}
    for record in of_phase(run.history, "train"):
        if record.get("site") in run.sites and record.get("num_examples"):
            rounds.setdefault(int(record["round"]), {})[str(record["site"])] = number(record["num_examples"])
    for round_number, items in sorted(rounds.items()):
        total = math.fsum(items.values())
        for site, count in items.items():
            lines.setdefault(site, {})[round_number] = count / total
    return lines, "share of the training items"


def weight_blocks(run: RunData) -> list[Block]:
    """The section on weights, and what else the rule noted about each site."""
    lines, what = weight_lines(run)
    found: list[Block] = []
    if what != "weight in the new model" and lines:
        text = "The rule noted no weights. Shown is each site's share of the training items: the weight plain averaging would give it."
        found.append(Text(text, "note"))
    known = {site: line for site, line in lines.items() if site in run.sites}
    beside: list[Block] = []
    if known and figures.available():
        beside.append(Figures([plots.weights("weights", known, run.sites, what)], legend_of(run)))
    header, rows = tables.weight_table(run.summary)
    if rows:
        caption = "Weights of the last round beside the shares of the training items"
        beside.append(Table(caption, header, rows_of(rows, series=run.sites)))
    elif known:
        ends = [[site, show(plots.last_of(known[site]))] for site in sorted(known)]
        beside.append(Table(f"{what}, last round", ["site", "share"], rows_of(ends, series=run.sites)))
    notes = _notes_table(run)
    found += [Beside(beside)] if beside else []
    return [*found, notes] if notes is not None else found


def _notes_table(run: RunData) -> Table | None:
    """Every note that has one number per site, last value."""
    notes = {
        key: value
        for key, value in run.summary.get("notes", {}).items()
        if key != "weights" and isinstance(value, Mapping) and value and set(value) <= set(run.sites)
        and all(isinstance(v, (int, float)) or v is None for v in value.values())
    }  # fmt: skip
    if not notes:
        return None
    rows = [Row([site, *(show(notes[key].get(site)) for key in notes)], place) for site, place in run.sites.items()]
    return Table("What else the rule noted, last value", ["site", *(key.replace("_", " ") for key in notes)], rows)
