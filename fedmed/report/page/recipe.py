"""What was done to the data: the recipe of the derived site file, if that file is still there, and what came out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fedmed.report.page.parts import Block, Facts, Row, Table, Text
from fedmed.report.page.run_data import RunData
from fedmed.report.tables import show

_MOST_FILES = 200  # of the cache that are looked at
_MOST_NUMBERS = 8  # of a list


def find_recipe(run: RunData) -> Mapping[str, Any] | None:
    """The recipe of the file the run read; None when it has none or cannot be found any more.

    The source itself where the run derived nothing, else the newest derived file of the cache whose recipe agrees with the
    configuration, the seed, and the realised noise the run reports.
    """
    path = str(run.setting("data.path", ""))
    steps = [run.setting(f"data.{step}.name") for step in ("partition", "corruption")]
    if path and not path.startswith("phantom:") and not any(steps) and run.setting("data.resize") is None:
        return _recipe_of(Path(path))
    cache = run.setting("data.cache_dir")
    if not path or not cache:
        return None
    kind = path.partition(":")[2]
    stem = f"phantom-{kind}" if path.startswith("phantom:") else Path(path).stem
    try:
        files = sorted(
            (p for p in Path(cache).iterdir() if p.name.startswith(f"{stem}-") and p.suffix == ".h5"),
            key=lambda p: (-p.stat().st_mtime_ns, p.name),
        )
    except OSError:
        return None
    recipes = (_recipe_of(file) for file in islice(files, _MOST_FILES))
    return next((r for r in recipes if r is not None and _agrees(r, run)), None)


def _recipe_of(path: Path) -> Mapping[str, Any] | None:
    import h5py

    try:
        with h5py.File(path, "r") as file:  # one attribute: without the site file reader and torch
            found = json.loads(file.attrs["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _agrees(recipe: Mapping[str, Any], run: RunData) -> bool:
    """Whether a recipe is what the configuration of a run asks for, and made what the run found."""
    for step in ("partition", "corruption"):
        asked, done = run.setting(f"data.{step}.name"), recipe.get(step) or {}
        if done.get("name") != asked:
            return False
        args = run.setting(f"data.{step}.args", {})
        if any(done.get("args", {}).get(key) != value for key, value in args.items()):
            return False
    if recipe.get("resize") != run.setting("data.resize") or recipe.get("seed") != run.setting("seed", 0):
        return False
    made = {str(s.get("site")): s for s in recipe.get("sites", [])}
    truth = run.summary.get("truth", {})
    if not set(truth) <= set(made):
        return False
    return all(
        made.get(site, {}).get(key) == value
        for site, info in truth.items()
        for key, value in info.items()
        if key in made.get(site, {})
    )


def shown_fact(value: Any) -> str | None:
    """A fact for a table: numbers, yes and no, short words, short lists of numbers; None for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, (int, float)):
        return show(value)
    if isinstance(value, str):
        return value if len(value) <= 40 else None
    if isinstance(value, Sequence) and all(isinstance(v, (int, float)) for v in value):
        words = [show(v, 2) for v in value[:_MOST_NUMBERS]]
        return ", ".join([*words, "..."] if len(value) > _MOST_NUMBERS else words) or "none"
    return None


def facts_table(run: RunData, recipe: Mapping[str, Any] | None) -> Table | None:
    """Counts and realised noise of each site: of the recipe, else of the truth in the summary; None where neither says anything."""
    known = {str(s.get("site")): {k: v for k, v in s.items() if k != "site"} for s in (recipe or {}).get("sites", [])}
    found = known or {site: dict(info) for site, info in run.summary.get("truth", {}).items()}
    cells = {site: {key: shown_fact(value) for key, value in info.items()} for site, info in found.items()}
    columns = list(dict.fromkeys(key for info in cells.values() for key, text in info.items() if text is not None))
    if not columns:
        return None
    rows = [
        Row([site, *(info.get(key) or "-" for key in columns)], run.sites.get(site))
        for site, info in sorted(cells.items())
    ]
    return Table("What each site got", ["site", *(c.replace("_", " ") for c in columns)], rows)


def blocks(run: RunData) -> list[Block]:
    """The section on the data."""
    recipe = find_recipe(run)
    steps = {step: (recipe or {}).get(step) or run.setting(f"data.{step}") for step in ("partition", "corruption")}
    source = (recipe or {}).get("source") or {}
    pairs = [("data", str(run.setting("data.path", "")) or "each site's own file")]
    if source:
        pairs.append(("source file", f"{source.get('file')} (sha256 {str(source.get('sha256'))[:16]})"))
    resize = run.setting("data.resize")
    pairs += [("resized to", f"{resize} pixels a side")] if resize else []
    for step, what in steps.items():
        args = (what or {}).get("args") or {}
        words = ", ".join(f"{key} {value}" for key, value in args.items() if value is not None)
        name = (what or {}).get("name")
        pairs.append((step, f"{name}: {words}" if name and words else str(name or "none")))
    found: list[Block] = [Facts(pairs, wide=True)]
    table = facts_table(run, recipe)
    if table is not None:
        found.append(table)
    if recipe is None and any(run.setting(f"data.{step}.name") for step in steps):
        text = "The derived site file was not found any more: the steps above are those of the configuration, without the defaults."
        found.append(Text(text, "note"))
    return found
