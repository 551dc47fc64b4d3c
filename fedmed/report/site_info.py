"""A site file in a few lines, from its headers."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import h5py

from fedmed.data.site_checks import ANNOTATIONS
from fedmed.data.site_file import SiteFile
from fedmed.report.tables import text_table

_LONGEST = 300  # characters of free text


def describe(path: Path) -> list[str]:
    """What a site file holds: task, classes, image type, sites with their splits and annotations, how it was made.

    Reads no pixels. Raises UserError for what is no site file.
    """
    with SiteFile.open(path) as sites, h5py.File(path, "r") as file:
        nodes = [file[info.group] if info.group else file for info in sites.sites]
        kinds = sorted({node["image"].dtype.name for node in nodes})
        rows = []
        for info, node in zip(sites.sites, nodes, strict=True):
            reads, kind = node.attrs.get("annotation"), node.attrs.get("label_kind")
            there = [name for name in ANNOTATIONS if name in node]
            said = ", ".join(f"{n} ({kind})" if n == reads and kind not in (None, reads) else n for n in there)
            rows.append([info.name, *map(str, (info.n, info.n_train, info.n_val, info.n_test)), said])
        lines = [
            f"{path.name}: {sites.task}, {sum(info.n for info in sites.sites)} images of {len(rows)} {'site' if len(rows) == 1 else 'sites'}",
            f"classes: {', '.join(sites.classes)}",
            f"images: {sites.image_size[0]} x {sites.image_size[1]}, {', '.join(kinds)}, channels {', '.join(sites.channels)}",
            *_made(sites.recipe),
        ]
        before = sites.meta.get("preprocessing")
        lines += [f"preprocessing: {textwrap.shorten(str(before), _LONGEST, placeholder=' ...')}"] if before else []
        pooled = ["central"] * sites.central + [f"central_{name}" for name in sites.conditions]
        lines += [f"pooled images: {', '.join(pooled)}"] if pooled else []
    return [*lines, "", text_table(["site", "images", "train", "val", "test", "annotation"], rows)]


def _made(recipe: dict[str, Any] | None) -> list[str]:
    """The steps of a recipe, one line."""
    if recipe is None:
        return []
    steps = []
    for key in ("resize", "partition", "corruption", "split"):
        step = recipe.get(key)
        if isinstance(step, dict):
            words = [f"{name}={value}" for name, value in (step.get("args") or {}).items() if value is not None]
            steps.append(" ".join([f"{key} {step.get('name')}", *words]))
        elif step is not None:
            steps.append(f"{key} {step}")
    source = recipe.get("source")
    origin = f" from {source['file']}" if isinstance(source, dict) and "file" in source else ""
    seed = [f"seed {recipe['seed']}"] if recipe.get("seed") is not None else []
    return [f"made{origin}: {'; '.join([*steps, *seed]) or 'as it is'}"]
