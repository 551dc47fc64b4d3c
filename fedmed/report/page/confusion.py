"""Confusion counts as tables: pooled over the sites, central, and site by site where the sites' folders are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.errors import UserError
from fedmed.files import read_json
from fedmed.report.page.parts import Block, Cell, Fold, Row, Table, Text
from fedmed.report.page.run_data import RunData
from fedmed.report.tables import show

FILE = "confusion.json"
_DIMENSIONS = {"classification": 2, "segmentation": 2, "multilabel": 3}


def read_counts(path: Path) -> dict[str, Any] | None:
    """Read `confusion.json` of a site; None when it is missing or not what it should be. `counts` becomes an int64 array."""
    try:
        found = read_json(path / FILE)
        counts = np.asarray(found["counts"], dtype=np.int64)
        classes, task = [str(c) for c in found["classes"]], str(found["task"])
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
    sides = (len(classes), len(classes)) if task != "multilabel" else (len(classes), 2, 2)
    if counts.ndim != _DIMENSIONS.get(task) or counts.shape != sides or not len(classes):
        return None
    return {**found, "counts": counts, "classes": classes, "task": task}


def blocks(run: RunData) -> list[Block]:
    """Tables of the counts of the last evaluation; [] where nobody counted."""
    sites = {site: read_counts(path) for site, path in run.site_folders().items()}
    known = {site: found for site, found in sites.items() if found is not None}
    central = read_counts(run.central_folder)
    first = central or next(iter(known.values()), None)
    if first is None:
        return []
    alike = {s: f for s, f in known.items() if (f["task"], f["classes"]) == (first["task"], first["classes"])}
    where = f"{first.get('split', 'test')} items, {first.get('view', 'global')} view"
    found: list[Block] = [Text(_how(first["task"]), "note")]
    if alike:
        pooled = sum(f["counts"] for f in alike.values())
        found.append(counts_table(f"All {len(alike)} sites together ({where})", {**first, "counts": pooled}))
    if central is not None:
        found.append(counts_table("Central test items", central))
    if len(alike) > 1:
        own: list[Block] = [counts_table(site, f) for site, f in sorted(alike.items())]
        found.append(Fold("Site by site", own))
    return found


def _how(task: str) -> str:
    if task == "multilabel":
        return "A class counts as predicted above probability 0.5; labels that are not known are left out."
    unit = "Pixels" if task == "segmentation" else "Cases"
    return f"{unit} by reference (rows) and prediction (columns); the shade is the share of the row. What is not annotated is left out."


def counts_table(caption: str, found: Mapping[str, Any]) -> Table:
    """Reference against prediction; multilabel: sensitivity and specificity by class."""
    if found["task"] == "multilabel":
        return _by_class(caption, found["classes"], found["counts"])
    classes, counts = found["classes"], found["counts"]
    rows: list[Row] = []
    for name, line in zip(classes, counts.tolist(), strict=True):
        total = sum(line)
        cells: list[Cell | str] = [
            Cell(f"{v:,}", f"heat{min(9, 10 * v // total)}" if total and v else "") for v in line
        ]
        recall = line[len(rows)] / total if total else None
        rows.append(Row([name, *cells, show(recall)]))
    precision = [
        show(counts[c, c] / column if (column := int(counts[:, c].sum())) else None) for c in range(len(classes))
    ]
    rows.append(Row(["precision", *precision, ""], foot=True))
    return Table(caption, ["reference", *classes, "recall"], rows)


def _by_class(caption: str, classes: Sequence[str], counts: np.ndarray[Any, Any]) -> Table:
    rows = []
    for name, ((tn, fp), (fn, tp)) in zip(classes, counts.tolist(), strict=True):
        rates = [tp / (tp + fn) if tp + fn else None, tn / (tn + fp) if tn + fp else None]
        rows.append(Row([name, *(f"{v:,}" for v in (tp, fn, fp, tn)), *(show(rate) for rate in rates)]))
    header = ["class", "found", "missed", "false alarm", "rightly absent", "sensitivity", "specificity"]
    return Table(caption, header, rows)
