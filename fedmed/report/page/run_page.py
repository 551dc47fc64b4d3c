"""The page about one run, section by section."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from fedmed.report.page import communication, confusion, pictures, recipe, run_scores, run_sites
from fedmed.report.page.parts import Block, Code, Facts, Fold, Page, Section, Text, has_pictures
from fedmed.report.page.run_data import RunData, read_run

LEFT_OUT = "Images are left out of this page."


def run_page(path: Path, images: bool) -> Page:
    """The page about the run in a folder. Raises `UserError` when it holds none."""
    run = read_run(path)
    sections = [
        Section("summary", "Summary", run_scores.overview(run)),
        Section("curves", "Curves", run_scores.curve_blocks(run)),
        Section("fairness", "Sites beside each other", run_scores.fairness_blocks(run)),
    ]
    optional: list[tuple[str, str, Callable[[RunData], list[Block]]]] = [
        ("conditions", "Conditions and views", run_scores.condition_blocks),
        ("noisy", "Noisy sites", run_sites.identification),
        ("weights", "Weights", run_sites.weight_blocks),
        ("communication", "Communication", communication.blocks),
        ("cases", "Cases", lambda run: case_blocks(run, images)),
        ("confusion", "Confusion", confusion.blocks),
        ("data", "Data", recipe.blocks),
        ("configuration", "Configuration", configuration),
    ]
    for name, title, make in optional:
        found = make(run)
        sections += [Section(name, title, found)] if found else []
    subtitle = f"{run.summary.get('engine')} engine, seed {run.summary.get('seed')}, {run.summary.get('rounds')} rounds"
    title = str(run.summary.get("name") or path.name)
    return Page(title, subtitle, sections, any(has_pictures(section.blocks) for section in sections))


def case_blocks(run: RunData, images: bool) -> list[Block]:
    """Example cases, or a line that says where they went."""
    if not images:
        return [Text(LEFT_OUT, "note")]
    found = pictures.blocks(run)
    text = "The best, the median and the worst test case of a site, by the score of the case in the last evaluation."
    return [Text(text), *found] if found else []


def configuration(run: RunData) -> list[Block]:
    """The whole configuration, versions, and the command that does the run again."""
    found: list[Block] = []
    if run.config_text:
        again = shlex.join(["fedmed", "run", f"{run.folder.path.name}/config.yaml", "--out", "NEW_FOLDER"])
        found += [Text("To repeat the run, from the folder that holds this run's folder:"), Code(again)]
        found.append(Fold("The whole configuration (config.yaml)", [Code(run.config_text)]))
    versions = run.summary.get("versions", {})
    found += [Facts([(str(name), str(version)) for name, version in versions.items()])] if versions else []
    return found
