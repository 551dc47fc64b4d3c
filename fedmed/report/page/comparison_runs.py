"""The runs of a comparison: one of each arm in short, conditions, cost, commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fedmed.errors import UserError
from fedmed.files import read_json
from fedmed.report.page import pictures
from fedmed.report.page.communication import amount
from fedmed.report.page.comparison_data import Comparison
from fedmed.report.page.parts import Block, Cell, Code, Facts, Fold, Links, Row, Table, Text, rows_of
from fedmed.report.page.run_data import read_run
from fedmed.report.page.run_page import LEFT_OUT
from fedmed.report.page.run_scores import sentence
from fedmed.report.page.run_sites import identification
from fedmed.report.tables import clock, show
from fedmed.report.values import mean, number

Kept = Mapping[tuple[str, str], Fold]  # (setting, arm) -> its run in short
_MOST_SITES, _MOST_PICTURED = 3, 24  # sites with pictures in one run, and in all of them together


def run_folds(comparison: Comparison, images: bool) -> dict[tuple[str, str], Fold]:
    """The finished run with the first seed of every setting and arm: what it reached, noisy sites, example cases of a few sites."""
    chosen = []
    for setting in comparison.settings:
        for arm in comparison.arms(setting):
            seeds = [seed for seed in comparison.seeds if comparison.cells.get((str(setting["name"]), arm, seed))]
            folder = comparison.run_folder(setting, arm, seeds[0]) if seeds else None
            if folder is not None:
                chosen.append((setting, arm, seeds[0], folder))
    sites = min(_MOST_SITES, max(1, _MOST_PICTURED // max(1, len(chosen))))
    found: dict[tuple[str, str], Fold] = {}
    for place, (setting, arm, seed, folder) in enumerate(chosen):
        try:
            run = read_run(folder)
        except UserError:
            continue
        blocks: list[Block] = [Text(sentence(run)), *identification(run, by_site=False)]
        if images and place < _MOST_PICTURED:
            blocks += pictures.blocks(run, sites)
        title = f"{setting['name']}: {arm}, seed {seed}"
        found[str(setting["name"]), arm] = Fold(title, blocks, anchor=f"run-{place + 1}")
    return found


def run_blocks(comparison: Comparison, kept: Kept, images: bool) -> list[Block]:
    """The section with all of them; [] when no run has finished."""
    note = [] if images else [Text(LEFT_OUT, "note")]
    text = "The run with the first seed of each arm, folded. The page about a run's own folder shows all of it."
    return [Text(text), *note, *kept.values()] if kept else []


def links(comparison: Comparison, setting: Mapping[str, Any], kept: Kept) -> list[Block]:
    """Links from a setting to its runs."""
    targets = [
        (kept[key].anchor, key[1]) for arm in comparison.arms(setting) if (key := (str(setting["name"]), arm)) in kept
    ]
    return [Links("One run of:", targets)] if targets else []


def conditions(comparison: Comparison, setting: Mapping[str, Any], arm: str) -> dict[str, float]:
    """Central scores by condition and the gap between them, averaged over the seeds; {} where there is but the clean one."""
    found: dict[str, list[float]] = {}
    for seed in comparison.seeds:
        folder = comparison.run_folder(setting, arm, seed)
        try:
            summary = read_json(folder / "summary.json") if folder is not None else {}
        except UserError:
            continue
        if not isinstance(summary, Mapping):
            continue
        tail = (summary.get("fairness") or {}).get("tail") or {}
        if summary.get("main_metric") != comparison.metric or len(tail.get("by_condition", {})) < 2:
            continue
        for name, value in {**tail["by_condition"], "gap": tail.get("gap")}.items():
            found.setdefault(str(name), []).append(number(value))
    return {name: mean(values) for name, values in found.items()}


def cost_blocks(comparison: Comparison) -> list[Block]:
    """The estimates of the file, if it has any."""
    rows = []
    for cost in comparison.doc.get("cost") or []:
        sizes = [
            amount(number(cost.get(key))) if cost.get(key) else "-" for key in ("down", "up", "memory", "gpu_memory")
        ]
        counts = [f"{number(cost.get(key)):,.0f}" if cost.get(key) else "-" for key in ("steps", "forward", "backward")]
        rows.append(
            [str(cost.get("setting")), str(cost.get("arm")), clock(number(cost.get("seconds"))), *counts, *sizes]
        )
    header = [
        "setting",
        "arm",
        "time of a run",
        "training steps",
        "images forward",
        "images backward",
        "down",
        "up",
        "memory",
        "GPU memory",
    ]
    note = "Estimated from short measurements. Steps, images and bytes are those of one site over all rounds, on average over the sites."
    return [Table("Estimated cost of a run", header, rows_of(rows), note)] if rows else []


def command_blocks(comparison: Comparison) -> list[Block]:
    """How the comparison was made, which runs failed, and the exact command of every run."""
    doc, cells = comparison.doc, list(comparison.cells.values())
    found: list[Block] = []
    if doc.get("command"):
        found += [Text("The comparison was made, and is made again, by:"), Code(str(doc["command"]))]
    failed = [cell for cell in cells if cell.get("state") == "failed"]
    waiting = [cell for cell in cells if cell.get("state") == "waiting"]
    if failed:
        rows = [Row([_name(cell), Cell(str(cell.get("error") or "no reason given"), "text")]) for cell in failed]
        found.append(Table("Runs that failed", ["run", "reason"], rows))
    if waiting:
        found.append(Text(f"Not run yet: {', '.join(_name(cell) for cell in waiting)}.", "warn"))
    if cells:
        rows = [
            Row([
                _name(cell), str(cell.get("state")), clock(number(cell.get("seconds"))), str(cell.get("config_hash") or "-"),
                Cell(_command(cell), "code"),
            ])
            for cell in cells
        ]  # fmt: skip
        table = Table("Every run with its command", ["run", "state", "time", "configuration", "command"], rows)
        found.append(Fold(f"All {len(cells)} runs with their commands", [table]))
    versions = doc.get("versions") or {}
    return [*found, Facts([(str(k), show(v)) for k, v in versions.items()])] if versions else found


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell.get('setting')}/{cell.get('arm')}-{cell.get('seed')}"


def _command(cell: Mapping[str, Any]) -> str:
    command = cell.get("command") or ""
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)
