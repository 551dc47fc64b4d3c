"""Writing site files: atomically, in the layout that `site_file` reads."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedmed.data.site_checks import LAYOUT, SPLITS
from fedmed.errors import UserError

CHUNK = 8  # images per compressed block
MAX_ATTRIBUTE = 12_000  # int32 entries; HDF5 attributes end at 64 KB, longer index lists become datasets
_JSON_KEYS = ("classes", "channels", "image_size")


@dataclass
class SiteArrays:
    """One site to be written.

    image (N,H,W[,C]) uint8, uint16, float16 or float32; annotations: name (mask, label, scribble, box, ...) -> array
    (N, ...); splits: train, val, test -> indices, disjoint (missing: empty); item_id, group_id: N strings; extras:
    further datasets (modality_present, active_classes, slice_no, ...); attrs: attributes of the group (natural_site,
    annotation, label_kind, ...); reference: clean arrays kept for measuring; truth: attributes of `reference/`
    (is_noisy bool, noise_rate float, ...); group: HDF5 group (default site_00, site_01, ... in order).
    """

    name: str
    image: np.ndarray
    annotations: Mapping[str, np.ndarray]
    splits: Mapping[str, np.ndarray]
    item_id: Sequence[str] = ()
    group_id: Sequence[str] = ()
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, np.ndarray] = field(default_factory=dict)
    truth: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None


def write_site_file(
    path: str | Path,
    meta: Mapping[str, Any],
    sites: Sequence[SiteArrays],
    central: SiteArrays | None = None,
    recipe: Mapping[str, Any] | None = None,
    compression: int = 1,
    conditions: Mapping[str, SiteArrays] | None = None,
) -> Path:
    """Write a site file and return its path; a reader sees the old file or the complete new one, never a part.

    `meta`: root attributes; task, classes, channels and image_size are needed, lists are stored as JSON. `central`:
    pooled clean images, group `central`. `recipe`: how a derived file came about (JSON). `compression`: gzip level 0-9.
    `conditions`: the central items under other conditions (a degraded copy, ...), each in a group `central_<name>`.
    Raises UserError when `meta` is incomplete.
    """
    path = Path(path)
    check_meta(path, meta)
    with published(path) as partial, h5py.File(partial, "w") as file:
        write_head(file, meta, len(sites), recipe)
        for index, site in enumerate(sites):
            _write_site(file.create_group(site.group or group_name(index)), site, compression)
        if central is not None:
            _write_site(file.create_group("central"), central, compression)
        for condition, items in (conditions or {}).items():
            _write_site(file.create_group(f"central_{condition}"), items, compression)
    return path


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A name beside `path` that no other writer has; what lies there at the end takes the place of `path`, and goes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refused(path: Path, failure: Exception) -> UserError:
    """The error to raise when the system does not let a file be written, without the words of HDF5 about its inside."""
    number = re.search(r"errno = (\d+)", str(failure))
    reason = os.strerror(int(number[1])) if number else str(failure)
    return UserError(f"Cannot write {path}: {reason}. Check the free space and the rights of the folder.")


def check_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Refuse root attributes that lack one a site file needs."""
    missing = [key for key in ("task", *_JSON_KEYS) if key not in meta]
    if missing:
        raise UserError(
            f"Cannot write {path}: the attributes {', '.join(missing)} are missing in meta. "
            "Give task, classes, channels, image_size."
        )


def group_name(index: int) -> str:
    """The group of the site number `index`, counted from 0."""
    return f"site_{index:02d}"


def write_head(file: h5py.File, meta: Mapping[str, Any], n_sites: int, recipe: Mapping[str, Any] | None) -> None:
    """Write the attributes of the file."""
    write_attrs(file, {**meta, "layout_version": LAYOUT, "n_sites": n_sites})
    if recipe is not None:
        file.attrs["recipe"] = json.dumps(recipe, sort_keys=True)


def write_attrs(node: h5py.Group, attrs: Mapping[str, Any]) -> None:
    """Write attributes; lists and mappings as JSON, None not at all."""
    for key, value in attrs.items():
        if value is None:
            continue
        node.attrs[key] = json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def write_strings(node: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Write strings (N,) as UTF-8 of one length."""
    node[name] = np.array([value.encode() for value in values], dtype=bytes) if values else np.zeros(0, "S1")


def write_site_attrs(
    node: h5py.Group, name: str, count: int, splits: Mapping[str, Any], attrs: Mapping[str, Any]
) -> None:
    """Write name, size and splits of a site, and attributes of its own; index lists too long for an attribute become datasets."""
    write_attrs(node, {"site_name": name, "n": count, **attrs})
    for split in SPLITS:
        indices = np.asarray(splits.get(split, ()), dtype=np.int32)
        if len(indices) <= MAX_ATTRIBUTE:
            node.attrs[f"{split}_idx"] = indices
        else:
            node[f"{split}_idx"] = indices


def _write_site(node: h5py.Group, site: SiteArrays, compression: int) -> None:
    count = len(site.image)
    for name, array in {"image": site.image, **site.annotations, **site.extras}.items():
        if name != "active_classes" and len(array) != count:
            raise UserError(
                f"Cannot write site {site.name!r}: {name} has {len(array)} entries, image has {count}. "
                "Give one per image."
            )
        _write_array(node, name, np.asarray(array), compression)
    for key in ("item_id", "group_id"):
        values = list(getattr(site, key)) or [f"{site.name}:{i}" for i in range(count)]
        if len(values) != count:
            raise UserError(
                f"Cannot write site {site.name!r}: {key} has {len(values)} entries, image has {count}. "
                "Give one per image."
            )
        write_strings(node, key, values)
    write_site_attrs(node, site.name, count, site.splits, site.attrs)
    if site.reference or site.truth:
        reference = node.create_group("reference")
        for name, array in site.reference.items():
            _write_array(reference, name, np.asarray(array), compression)
        write_attrs(reference, site.truth)


def _write_array(node: h5py.Group, name: str, array: np.ndarray, compression: int) -> None:
    if array.ndim >= 3 and array.size and compression:
        chunks = (min(CHUNK, array.shape[0]), *array.shape[1:])
        node.create_dataset(name, data=array, chunks=chunks, compression="gzip", compression_opts=compression)
    else:
        node.create_dataset(name, data=array)
