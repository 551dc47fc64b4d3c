"""The files of a comparison: comparison.json, tables, the list of runs, and the page; all of them follow from the run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.compare.identity import data_mark
from fedmed.compare.plan import Key, Plan
from fedmed.errors import UserError
from fedmed.files import json_ready, read_json, write_csv, write_json, write_text
from fedmed.report.run_folder import RunFolder
from fedmed.report.values import number

FILE = "comparison.json"
TABLES = ("tables.md", "tables.tex", "table.csv", "cells.csv")
Comparison = dict[str, Any]


def previous(plan: Plan) -> Comparison:
    """What an earlier command wrote into the folder of this comparison, {} if nothing.

    Raises `UserError` when the folder is that of another comparison, or of other data under the same name.
    """
    path = plan.out / FILE
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "comparison":
        raise UserError(f"{path} is no comparison; choose another --out")
    if (found.get("name"), found.get("variant")) != (plan.name, plan.variant):
        raise UserError(
            f"{plan.out} holds the comparison {found.get('name')}, variant {found.get('variant')}; choose another --out for {plan.name}, variant {plan.variant}"
        )
    before, now = found.get("data_mark"), data_mark(plan.data)
    if before and now and before != now:
        raise UserError(
            f"{plan.out} was made with another content of {found.get('data')}; choose a fresh --out for {plan.data}"
        )
    return found


def comparison(
    plan: Plan, earlier: Mapping[str, Any], failed: Mapping[Key, str], cost: Sequence[Any] = ()
) -> Comparison:
    """Build the content of comparison.json from the run folders of a plan.

    earlier: what the file holds (`previous`); failures of runs that have not been repeated since stay. failed: reasons of the runs that failed
    now. cost: estimates, see `fedmed.compare.cost`; those of the file stay where there is none. Raises `UserError` for a metric that no run has.
    """
    from fedmed.compare.results import results
    from fedmed.report.summary import versions

    return {
        "kind": "comparison",
        "name": plan.name,
        "variant": plan.variant,
        "description": plan.description,
        "base": plan.base,
        "data": Path(plan.data).name,
        "data_mark": data_mark(plan.data),
        "engine": plan.engine,
        "command": plan.command,
        "metrics": list(plan.metrics),
        "seed_metrics": list(plan.seed_metrics),
        "last_rounds": plan.last_rounds,
        "baseline": plan.baseline,
        "seeds": sorted({seed for setting in plan.settings for seed in setting.seeds}),
        "versions": versions(),
        "settings": [
            {"name": s.name, "title": s.title, "arms": list(s.arms), "against": s.against} for s in plan.settings
        ],
        "cells": _cells(plan, earlier, failed),
        "cost": _costs(cost, earlier.get("cost", [])),
        **results(plan),
    }


def _cells(plan: Plan, earlier: Mapping[str, Any], failed: Mapping[Key, str]) -> list[dict[str, Any]]:
    """One entry per run: state done, failed or waiting, wall time of a finished one, reason of a failed one."""
    told = {(c["setting"], c["arm"], c["seed"], c["config_hash"]): c["error"] for c in earlier.get("cells", [])}
    found = []
    for cell in plan.cells:
        summary = RunFolder(plan.out / cell.folder).summary
        done = summary.is_file()
        error = None if done else failed.get(cell.key, told.get((*cell.key, cell.config_hash)))
        found.append(
            {
                "setting": cell.setting,
                "arm": cell.arm,
                "seed": cell.seed,
                "folder": cell.folder,
                "command": cell.command,
                "config_hash": cell.config_hash,
                "state": "done" if done else "failed" if error else "waiting",
                "seconds": number(read_json(summary).get("seconds")) if done else None,
                "error": error,
            }
        )
    return found


def _costs(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """Estimates by setting and arm: the new ones in the place of the old."""
    kept = {(c["setting"], c["arm"]): c for c in old}
    kept.update({(c["setting"], c["arm"]): c for c in json_ready(new)})
    return list(kept.values())


def write_comparison(plan: Plan, content: Comparison) -> Path:
    """Write comparison.json so that a reader finds the old content or the new."""
    return write_json(plan.out / FILE, content)


def write_tables(folder: Path, content: Comparison) -> None:
    """Write tables.md, tables.tex, table.csv (every value) and cells.csv (every run with its exact command and hash)."""
    from fedmed.compare.latex import latex
    from fedmed.compare.tables import csv_rows, markdown

    markdown_file, latex_file, values_file, cells_file = (folder / name for name in TABLES)
    write_text(markdown_file, markdown(content))
    write_text(latex_file, latex(content))
    write_csv(values_file, csv_rows(content))
    columns = ("setting", "arm", "seed", "state", "seconds", "folder", "config_hash", "command", "error")
    write_csv(cells_file, [{key: cell[key] for key in columns} for cell in content["cells"]])


def write_html(folder: Path, say: Callable[[str], None], data: str) -> Path | None:
    """Write the page of a comparison from its comparison.json; `say` takes remarks of one line. None where it cannot be made.

    data: what the runs were made with; of phantom data there is nothing to remark, since nobody is shown on its images.
    """
    try:
        from fedmed.report.page import write_page

        path: Path = write_page(folder, say=(lambda _: None) if data.startswith("phantom:") else say)
    except ImportError as error:  # a package the page needs is not installed
        say(f"note: no page: {error}")
        return None
    return path
