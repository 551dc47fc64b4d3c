"""Predictions for the rows of a site file: masks as HDF5 with the same groups, or rows of the table of labels.

Letters: n rows that are predicted, H W pixels of the file, F foreground classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedmed.config import nearest
from fedmed.data.formats.limits import write_beside
from fedmed.data.mapped import open_rows
from fedmed.data.site_checks import SPLITS, choose_annotation, read_splits
from fedmed.data.site_file import SiteFile, SiteInfo
from fedmed.errors import UserError
from fedmed.predict.predictor import Predictor

ALL = "all"
Shown = Callable[[str, int], Any]  # site and number of rows -> what takes a plane for the contact sheet


@dataclass(frozen=True)
class Rows:
    """The rows of one site that are predicted: group in the file, name, rows (n,), item ids (n,), planes for the predictor."""

    group: str
    site: str
    rows: np.ndarray
    item_id: list[str]
    planes: Any


def check_split(split: str) -> None:
    """Raise UserError unless `split` is one of a site file, or "all"."""
    if split not in (*SPLITS, ALL):
        raise UserError(f"--split: expected {', '.join((*SPLITS, ALL))}, got {split!r}{nearest(split, (*SPLITS, ALL))}")


@contextmanager
def open_sites(path: Path, predictor: Predictor, site: str | None, split: str) -> Iterator[list[Rows]]:
    """The sites of a file with their rows of a split: that called `site` (or the only one there is), None: all.

    While it is open, images are read row by row. Raises UserError for a file that does not suit the model.
    """
    with SiteFile.open(path) as sites, h5py.File(path, "r") as file:
        if len(sites.channels) != len(predictor.model.channels):
            raise UserError(
                f"{path} has {len(sites.channels)} channels ({', '.join(sites.channels)}), the model reads {len(predictor.model.channels)} "
                f"({', '.join(predictor.model.channels)})"
            )
        found = []
        for info in _chosen(sites, site):
            node = file[info.group] if info.group else file
            where = f"{path}, site {info.name!r}"
            splits = read_splits(node, where, info.n)
            rows = np.arange(info.n) if split == ALL else np.sort(np.asarray(splits[split], dtype=np.int64))
            ids = node["item_id"].asstr()[...] if "item_id" in node else [f"{info.name}:{i}" for i in range(info.n)]
            present = node["modality_present"][...] if "modality_present" in node else None
            planes = predictor.preparation.rows(open_rows(node["image"], path), rows, present)
            found.append(Rows(info.group, info.name, rows, [str(ids[row]) for row in rows], planes))
        yield found


def label_kind(path: Path, group: str, annotation: str, task: str) -> str | None:
    """Kind of annotation that training reads at a site, as `SiteFile.site` says it; None where the file has none for it."""
    with h5py.File(path, "r") as file:
        node = file[group] if group else file
        try:
            chosen = choose_annotation(node, annotation, group, task)
        except UserError:
            return None
        kind = node.attrs.get("label_kind") if annotation in ("auto", node.attrs.get("annotation")) else None
        return str(kind or chosen)


def write_masks_of_site_file(
    path: Path, sites: list[Rows], predictor: Predictor, split: str, keep_probabilities: bool, shown: Shown
) -> None:
    """Write `prediction` (n, H, W) uint8, `row` and `item_id` of every site, `probability` (n, F, H, W) float32 where asked for.

    Rows are written as they are predicted; the file appears when it is complete.
    """

    def write(partial: Path) -> None:
        with h5py.File(partial, "w") as file:
            file.attrs.update(task="segmentation", classes=list(predictor.classes), split=split)
            for site in sites:
                group = file.create_group(site.group) if site.group else file
                group.attrs["site_name"] = site.site
                group["row"] = site.rows
                group.create_dataset("item_id", data=site.item_id, dtype=h5py.string_dtype())
                _fill(group, site, predictor, keep_probabilities, shown)

    write_beside(path, write)


def _fill(group: h5py.Group, site: Rows, predictor: Predictor, keep_probabilities: bool, shown: Shown) -> None:
    count, shape = len(site.rows), site.planes.shape

    def dataset(name: str, size: tuple[int, ...], dtype: type) -> h5py.Dataset:
        """One image per chunk; without images there are no chunks."""
        packed: dict[str, Any] = {"chunks": (1, *size), "compression": "gzip"} if count else {}
        return group.create_dataset(name, (count, *size), dtype, **packed)

    target = dataset("prediction", shape, np.uint8)
    shares = dataset("probability", (len(predictor.classes) - 1, *shape), np.float32) if keep_probabilities else None
    for number, (labels, prob) in enumerate(predictor.masks(site.planes, shown(site.site, count))):
        target[number] = labels
        if shares is not None:
            shares[number] = prob


def _chosen(sites: SiteFile, name: str | None) -> tuple[SiteInfo, ...]:
    """The sites that are meant; a file of one site is that of whoever asks."""
    if name is None or len(sites.sites) == 1:
        return sites.sites
    found = tuple(info for info in sites.sites if info.name == name)
    if not found:
        raise UserError(f"{sites.path} has no site {name!r}{nearest(name, [info.name for info in sites.sites])}")
    return found
