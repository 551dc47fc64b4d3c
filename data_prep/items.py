"""Items of a site file in memory, as a data protocol moves them: read, shrunk, pooled, cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.resize import resize_classes, resize_images
from fedmed.data.site_checks import ANNOTATIONS, SPLITS, read_splits
from fedmed.data.writer import SiteArrays
from fedmed.errors import UserError


@dataclass(frozen=True)
class Items:
    """One site, or a pool. arrays: per-item datasets (N first); reference: clean annotations kept for measuring.

    splits: train/val/test -> int32 indices; attrs: attributes of the group; facts: attributes of its reference group
    (noise_rate, is_noisy, ...).
    """

    group: str
    name: str
    arrays: dict[str, np.ndarray]
    splits: dict[str, np.ndarray]
    reference: dict[str, np.ndarray] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of items."""
        return len(self.arrays["image"])


def read_items(path: Path, groups: Sequence[str]) -> list[Items]:
    """Sites of a file completely in memory, in the order of `groups` ("" is the root)."""
    with h5py.File(path, "r") as file:
        return [_read_group(file[group] if group else file, group, path) for group in groups]


def _read_group(node: h5py.Group, group: str, path: Path) -> Items:
    size = len(node["image"])
    attrs = {} if group == "" else dict(node.attrs)
    splits = {split: np.sort(rows) for split, rows in read_splits(node, f"{path}, {group or 'root'}", size).items()}
    arrays = {
        key: dataset[()]
        for key, dataset in node.items()
        if isinstance(dataset, h5py.Dataset) and dataset.ndim and len(dataset) == size and not key.endswith("_idx")
    }
    active = node.attrs.get("active_classes", node["active_classes"][()] if "active_classes" in node else None)
    if active is not None and np.ndim(active) == 1:  # said of the site as a whole: moves with its items from here on
        arrays["active_classes"] = np.tile(np.asarray(active, dtype=np.uint8), (size, 1))
    for key in ("n", "active_classes", *(f"{split}_idx" for split in SPLITS)):
        attrs.pop(key, None)
    for key in ("item_id", "group_id"):
        arrays.setdefault(key, np.array([f"{group}:{item}" for item in range(size)], dtype=bytes))
    reference = node.get("reference")
    clean = {} if reference is None else {key: value[()] for key, value in reference.items()}
    facts = {} if reference is None else dict(reference.attrs)
    name = str(attrs.pop("site_name", "") or group or node.attrs.get("site_name", "") or path.stem)
    return Items(group, name, arrays, splits, clean, attrs, facts)


def shrink(items: Items, new_size: int, ignore: Mapping[str, int]) -> Items:
    """Items with images and masks of any kind shrunk to new_size x new_size pixels (aspect ratio not kept).

    ignore: for each annotation that has one, the value that means "not annotated".
    """
    shape = items.arrays["image"].shape[1:3]

    def convert(key: str, values: np.ndarray) -> np.ndarray:
        if key == "image":
            return resize_images(values, new_size)
        if values.shape[1:] == shape:
            return resize_classes(values, new_size, ignore.get(key))
        if key in ("box", "class_boxes"):
            raise UserError(f"data.resize: {key} holds coordinates, which cannot be resized. Leave data.resize out.")
        return values

    arrays = {key: convert(key, values) for key, values in items.arrays.items()}
    return replace(items, arrays=arrays, reference={key: convert(key, v) for key, v in items.reference.items()})


def pool(sites: Sequence[Items]) -> tuple[Items, np.ndarray]:
    """All items of several sites one after the other, and the site index (N,) of each.

    Datasets and attributes that are not common to all sites are left out; a site that does not say which classes it
    annotates counts as annotating all. Sites whose image type or annotations differ cannot be pooled (UserError).
    """
    _check_alike(sites)
    widths = [site.arrays["active_classes"].shape[1] for site in sites if "active_classes" in site.arrays]
    columns = []
    for site in sites:
        extra = {"active_classes": np.ones((site.size, widths[0]), dtype=np.uint8)} if widths else {}
        columns.append({**extra, **site.arrays})
    arrays = {key: np.concatenate([column[key] for column in columns]) for key in _common(columns)}
    references = [site.reference for site in sites]
    reference = {key: np.concatenate([clean[key] for clean in references]) for key in _common(references)}
    starts = np.cumsum([0] + [site.size for site in sites])
    splits = {
        split: np.concatenate([site.splits[split] + start for site, start in zip(sites, starts[:-1], strict=True)])
        for split in SPLITS
    }
    attrs = {
        key: sites[0].attrs[key]
        for key in _common([site.attrs for site in sites])
        if all(np.array_equal(site.attrs[key], sites[0].attrs[key]) for site in sites)
    }
    site_of = np.repeat(np.arange(len(sites)), [site.size for site in sites])
    return Items("", "pool", arrays, splits, reference, attrs), site_of


def _check_alike(sites: Sequence[Items]) -> None:
    first = sites[0]
    for site in sites[1:]:
        for key in ("image", *ANNOTATIONS):
            kinds = [(s.arrays[key].shape[1:], s.arrays[key].dtype) if key in s.arrays else None for s in (first, site)]
            if kinds[0] != kinds[1]:
                raise UserError(
                    f"partition: sites {first.name} and {site.name} differ in {key} (presence, shape or type): they "
                    "cannot be pooled. Use data.partition.name=natural or write both sites alike."
                )


def take(pooled: Items, chosen: dict[str, np.ndarray], group: str, name: str) -> Items:
    """A new site from pooled items: `chosen` maps each split to pooled positions; items are stored train, val, test."""
    order = np.concatenate([chosen[split] for split in SPLITS]).astype(np.int64)
    edges = np.cumsum([0] + [len(chosen[split]) for split in SPLITS])
    splits = {split: np.arange(edges[i], edges[i + 1], dtype=np.int32) for i, split in enumerate(SPLITS)}
    arrays = {key: values[order] for key, values in pooled.arrays.items()}
    reference = {key: values[order] for key, values in pooled.reference.items()}
    return Items(group, name, arrays, splits, reference, {**pooled.attrs, "natural_site": False})


def site_arrays(items: Items) -> SiteArrays:
    """The items as the writer of site files takes them."""
    arrays = dict(items.arrays)
    image = arrays.pop("image")
    names = {key: [value.decode() for value in arrays.pop(key).tolist()] for key in ("item_id", "group_id")}
    annotations = {key: arrays.pop(key) for key in ANNOTATIONS if key in arrays}
    return SiteArrays(
        name=items.name,
        image=image,
        annotations=annotations,
        splits=items.splits,
        item_id=names["item_id"],
        group_id=names["group_id"],
        extras=arrays,
        attrs=items.attrs,
        reference=items.reference,
        truth=items.facts,
        group=items.group or None,
    )


def _common(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(set.intersection(*(set(mapping) for mapping in mappings)))
