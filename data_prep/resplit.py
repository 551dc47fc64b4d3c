"""New splits for a site file, and its sites as files of their own. Both copy pixels as they lie in the file, chunk by chunk."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.importers.splits import deal, parse_split
from fedmed.config import folder_name
from fedmed.data.site_checks import SPLITS
from fedmed.data.site_file import CENTRAL, SiteFile
from fedmed.data.writer import MAX_ATTRIBUTE
from fedmed.errors import UserError

SCHEMA = "split-1"  # raise when the same words would give other splits


def deal_anew(source: Path, target: Path, ratio: str, seed: int) -> Path:
    """Copy a site file and give every site new splits by patient; return `target`.

    ratio: "70/10/20". All images of a group_id go to one split, at whatever site they are; labels are balanced as far as whole groups
    allow. Raises UserError for wrong shares and for a derived file, whose pooled or clean copies follow the old splits.
    """
    try:
        shares = parse_split(ratio)
    except UserError as error:
        raise UserError(f"--ratio: expected three numbers such as 70/10/20 (train/val/test), got {ratio!r}") from error
    with SiteFile.open(source) as file:
        sites, before = file.sites, file.recipe
    with h5py.File(source, "r") as file:
        nodes = [file[site.group] if site.group else file for site in sites]
        if CENTRAL in file or any("reference" in node for node in nodes):
            raise UserError(
                f"{source.name} was derived with the splits it has; deal the file anew that it was made from"
            )
    shutil.copyfile(source, target)
    fixed: dict[str, int] = {}
    summary = []
    with h5py.File(target, "r+") as file:
        for site in sites:
            node = file[site.group] if site.group else file
            groups = _groups(node, site.name, site.n)
            fixed |= deal(groups, _labels(node), fixed, shares, seed, site.name) if groups else {}
            split = np.array([fixed[group] for group in groups], dtype=np.int64)
            for code, name in enumerate(SPLITS):
                _write_rows(node, f"{name}_idx", np.flatnonzero(split == code).astype(np.int32))
            summary.append(
                {"site": site.name, **{f"n_{name}": int((split == code).sum()) for code, name in enumerate(SPLITS)}}
            )
        recipe = {"schema": SCHEMA, "source": _origin(source, before), "split": ratio, "seed": seed, "sites": summary}
        file.attrs["recipe"] = json.dumps(recipe, sort_keys=True)
    return target


def client_files(source: Path, folder: Path) -> list[Path]:
    """Write every site of a file into a file of its own in `folder`, the site at the root; return their paths in the order of the sites."""
    with SiteFile.open(source) as checked:
        sites = checked.sites
    written = []
    with h5py.File(source, "r") as file:
        for site in sites:
            path = folder / f"{folder_name(site.name)}.h5"
            with h5py.File(path, "w") as own:
                for key, value in file.attrs.items():
                    own.attrs[key] = value
                node = file[site.group] if site.group else file
                for key in node:
                    if site.group or not key.startswith(CENTRAL):
                        node.copy(key, own)
                for key, value in node.attrs.items():
                    own.attrs[key] = value
                own.attrs["n_sites"] = 1
                own.attrs["site_name"] = site.name
            written.append(path)
    return written


def _groups(node: h5py.Group, site: str, count: int) -> list[str]:
    """Group of each image; an image without one is a group of its own, told apart from those of other sites."""
    if "group_id" not in node:
        return [f"{site}\0{row}" for row in range(count)]
    names = [value.decode() if isinstance(value, bytes) else str(value) for value in node["group_id"][...].tolist()]
    return [name or f"{site}\0{row}" for row, name in enumerate(names)]


def _labels(node: h5py.Group) -> np.ndarray | None:
    return node["label"][...] if "label" in node and node["label"].dtype.kind in "biu" else None


def _write_rows(node: h5py.Group, key: str, rows: np.ndarray) -> None:
    if key in node:
        del node[key]
    if len(rows) <= MAX_ATTRIBUTE:
        node.attrs[key] = rows
    else:
        node.attrs.pop(key, None)
        node[key] = rows


def _origin(source: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """Name and content of the source, and how it came about where it says so."""
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    steps = {
        key: value for key, value in (before or {}).items() if key != "sites"
    }  # their numbers are replaced by ours
    return {"file": source.name, "sha256": digest, **({"recipe": steps} if steps else {})}
