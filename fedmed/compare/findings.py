"""What a method saw, beside the truth: columns of the table by seed, read out of a run folder.

A finding that a run has nothing to say about is a dash; so are all of a run that has not finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmed.compare.values import finished, history
from fedmed.config import nearest
from fedmed.errors import UserError
from fedmed.files import read_json
from fedmed.registry import import_attribute
from fedmed.report.run_folder import RunFolder
from fedmed.report.values import mean, of_phase, train_examples

DASH = "–"
_TAGS = "clients.missing_classes:TAGS"  # name of FedMLP's pseudo-labels in what a site keeps


class Finding(NamedTuple):
    """Columns of the table by seed, and the function that gives their cells for a run folder."""

    columns: tuple[str, ...]
    cells: Callable[[Path], list[str]]


def finding(name: str) -> Finding:
    """Give the finding of that name. Raises `UserError` naming the nearest one."""
    if name not in FINDINGS:
        raise UserError(f"findings: no finding is called {name!r}{nearest(name, FINDINGS)}")
    return FINDINGS[name]


def columns_of(names: Sequence[str]) -> list[str]:
    """Columns of several findings, side by side."""
    return [column for name in names for column in finding(name).columns]


def cells_of(names: Sequence[str], folder: Path) -> list[str]:
    """Cells of several findings, as many as `columns_of` has columns."""
    if not finished(folder):
        return [DASH] * len(columns_of(names))
    return [cell for name in names for cell in finding(name).cells(folder)]


def shown(value: float | None) -> str:
    """A number with two digits, a dash where there is none."""
    return DASH if value is None or math.isnan(value) else f"{value:.2f}"


def share_of(values: dict[str, float], sites: set[str]) -> float:
    """The part of a sum (site -> value) that comes from some sites; NaN when the sum is 0."""
    total = math.fsum(values.values())
    return math.fsum(v for site, v in values.items() if site in sites) / total if total else math.nan


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation, equal values sharing the mean of their ranks; NaN where one side is constant or empty."""
    if min(len(set(first)), len(set(second))) < 2:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _of_run(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Notes of a run, and truth by site."""
    summary = read_json(RunFolder(folder).summary)
    return summary.get("notes", {}), summary.get("truth", {})


def _noted(folder: Path, key: str) -> dict[str, float]:
    """A note that has one number per site; undefined ones left out."""
    return {site: float(v) for site, v in (_of_run(folder)[0].get(key) or {}).items() if v is not None}


def noisy(folder: Path) -> list[str]:
    """Precision and recall of the sites believed noisy, group sizes and the largest weight."""
    summary = read_json(RunFolder(folder).summary)
    judged, notes = summary.get("noisy_sites", {}), summary.get("notes", {})
    groups = ", ".join(f"{v} {k}" for k, v in sorted(notes.get("groups", {}).items()) if v)
    rates = [shown(judged.get("precision")), shown(judged.get("recall"))]
    return [*rates, groups or DASH, shown(notes.get("largest_weight"))]


def weight_on_corrupted(folder: Path) -> list[str]:
    """Weight of the last round on the truly corrupted sites, and what they would have by their number of examples."""
    corrupted = {site for site, info in _of_run(folder)[1].items() if info.get("is_noisy")}
    examples = {site: float(n) for site, n in train_examples(history(folder)).items()}
    return [shown(share_of(_noted(folder, "weights"), corrupted)), shown(share_of(examples, corrupted))]


def sharpness_ratio(folder: Path) -> list[str]:
    """Mean sharpness of the corrupted sites over that of the clean ones, in the last round."""
    truth, sharpness = _of_run(folder)[1], _noted(folder, "sharpness")
    corrupted, clean = (
        mean(v for site, v in sharpness.items() if truth.get(site, {}).get("is_noisy") == state)
        for state in (True, False)
    )
    return [shown(corrupted / clean if clean else None)]


def worst_site(folder: Path) -> list[str]:
    """Value and name of the worst site in the last evaluation."""
    sites = read_json(RunFolder(folder).summary).get("fairness", {}).get("sites", {})
    return [DASH if sites.get("worst_site") is None else f"{shown(sites['worst'])} ({sites['worst_site']})"]


def completeness_rank(folder: Path) -> list[str]:
    """Rank correlation between estimated and true completeness of the sites' annotations."""
    truth, estimated = _of_run(folder)[1], _noted(folder, "completeness")
    pairs = [(v, truth[site]["completeness"]) for site, v in estimated.items() if "completeness" in truth.get(site, {})]
    return [shown(rank_correlation([a for a, _ in pairs], [b for _, b in pairs]))]


def corrected(folder: Path) -> list[str]:
    """Sites that changed pixels of their masks, and how many pixels: the sites report what they have changed so far."""
    changed: dict[str, int] = {}
    for record in of_phase(history(folder), "train"):
        site, pixels = str(record["site"]), record["metrics"].get("n_corrected_pixels") or 0
        changed[site] = max(changed.get(site, 0), int(pixels))
    counts = [n for n in changed.values() if n]
    return [str(len(counts)), str(sum(counts))]


def tags(folder: Path) -> list[str]:
    """FedMLP's pseudo-labels against the reference: share of true ones among positive and negative tags, beside chance."""
    pairs = [pair for path in sorted(folder.glob("sites/*/personal")) for pair in site_tags(folder, path)]
    if not pairs:
        return [DASH] * 4
    positive, negative = ([float(truth) for tag, truth in pairs if tag == kind] for kind in (2, 1))
    chance = mean(float(truth) for _, truth in pairs)
    return [
        f"{shown(mean(positive))} of {len(positive)}",
        shown(chance),
        f"{shown(1.0 - mean(negative))} of {len(negative)}",
        shown(1.0 - chance),
    ]


def site_tags(folder: Path, personal: Path) -> list[tuple[int, int]]:
    """(tag, true label) of every training item and class a site does not annotate; 0 no tag, 1 negative, 2 positive.

    `personal`: the folder of what the site keeps between rounds. [] for a site that keeps no tags.
    """
    rounds = sorted(personal.glob("round-*/personal.safetensors"))
    if not rounds:
        return []
    import h5py

    from fedmed.config import folder_name, load_config
    from fedmed.data.site_file import SiteFile
    from fedmed.engines.prepare import site_file
    from fedmed.federation.checkpoint import read_safetensors

    kept = read_safetensors(rounds[-1]).get(import_attribute(_TAGS))
    if kept is None:
        return []
    path = site_file(load_config(RunFolder(folder).config))
    with SiteFile.open(path) as file, h5py.File(path, "r") as raw:
        info = next(i for i in file.sites if folder_name(i.name) == personal.parent.name)
        group, rows = raw[info.group], file.site(info.name).split("train").index.numpy()
        missing = group["active_classes"][()][rows] == 0
        truth = group["reference"]["label"][()][rows]
    return list(zip(kept.numpy()[missing].tolist(), truth[missing].tolist(), strict=True))


# What `findings` of a comparison may name.
FINDINGS: dict[str, Finding] = {
    "noisy": Finding(("precision", "recall", "groups", "largest weight"), noisy),
    "weight_on_corrupted": Finding(("weight on corrupted", "their share of examples"), weight_on_corrupted),
    "sharpness_ratio": Finding(("sharpness corrupted / clean",), sharpness_ratio),
    "worst_site": Finding(("worst site",), worst_site),
    "completeness_rank": Finding(("rank correlation of completeness",), completeness_rank),
    "tags": Finding(("positive tags right", "chance", "negative tags right", "chance"), tags),
    "corrected": Finding(("sites that corrected", "pixels"), corrected),
}
