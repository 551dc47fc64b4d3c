"""The frame of a site file: root attributes, sites, shapes, splits. Each fault becomes a finding, and what can be read is read.

The rules are those of the reader (`fedmed.data.site_checks`), asked one after the other instead of all or nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from data_prep.checks.findings import Findings
from fedmed.config import nearest
from fedmed.data.site_checks import (
    ANNOTATIONS,
    LAYOUT,
    SPLITS,
    TASKS,
    check_header,
    choose_annotation,
    read_json,
    read_splits,
    site_groups,
)
from fedmed.data.site_file import CENTRAL
from fedmed.errors import UserError


@dataclass(frozen=True)
class Root:
    """Root attributes; None where they are missing or unusable. derived: made by a data protocol (it has a recipe)."""

    task: str | None
    classes: tuple[str, ...] | None
    channels: tuple[str, ...] | None
    size: tuple[int, int] | None
    derived: bool
    pooled: bool  # has a group `central`


@dataclass
class Frame:
    """One site without its pixels: HDF5 group ("" the root), name, number of images (0: no usable image dataset), splits (row
    indices), annotations whose shape fits, the one training reads (""), label_kind; central: a pooled group, no site.
    """

    group: str
    name: str
    central: bool
    size: int = 0
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    annotations: list[str] = field(default_factory=list)
    training: str = ""
    label_kind: str = ""

    def split_of(self) -> np.ndarray:
        """Split of each row, (N,) int8: 0 train, 1 val, 2 test, -1 none."""
        owner = np.full(self.size, -1, dtype=np.int8)
        for code, split in enumerate(SPLITS):
            owner[self.splits.get(split, np.empty(0, dtype=np.int64))] = code
        return owner


def read_root(file: h5py.File, path: Path, findings: Findings) -> Root:
    """Root attributes, with an error for each that is missing or wrong."""
    attrs, short = file.attrs, Path(path.name)
    version, task = str(attrs.get("layout_version", "")), str(attrs.get("task", ""))
    if version != LAYOUT:
        findings.add("error", "root", f"layout_version must be {LAYOUT!r}, got {version or 'nothing'!r}")
    if task not in TASKS:
        hint = nearest(task, TASKS)
        findings.add("error", "root", f"task must be one of {', '.join(TASKS)}, got {task or 'nothing'!r}{hint}")
    lists: dict[str, list[Any] | None] = {}
    for key in ("classes", "channels", "image_size"):
        lists[key] = None
        try:
            value = read_json(attrs, key, short)
        except UserError as error:
            findings.add("error", "root", str(error))
            continue
        if isinstance(value, list) and value:
            lists[key] = value
        else:
            findings.add("error", "root", f"{key} must be a JSON list that is not empty, got {value!r}")
    classes, channels, size = lists["classes"], lists["channels"], lists["image_size"]
    if size is not None and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        findings.add("error", "root", f"image_size must be [height, width] in pixels, got {size!r}")
        size = None
    for key, names in (("classes", classes), ("channels", channels)):
        twice = [name for name, times in Counter(map(str, names or ())).items() if times > 1]
        if twice:
            findings.add("error", "root", f"{key} names {twice[0]!r} twice")
    _check_attributes(file, "", findings)
    return Root(
        task if task in TASKS else None,
        None if classes is None else tuple(map(str, classes)),
        None if channels is None else tuple(map(str, channels)),
        None if size is None else (size[0], size[1]),
        "recipe" in attrs,
        CENTRAL in file,
    )


def _check_attributes(node: h5py.Group, site: str, findings: Findings) -> None:
    """Types of the optional attributes of the file or a site."""
    for key, value in node.attrs.items():
        if key == "recipe":
            try:
                json.loads(value)
            except (TypeError, ValueError) as error:
                findings.add("error", "root", f"recipe is not valid JSON ({error})")
        elif key.startswith("ignore_value") and not isinstance(value, (int, np.integer)):
            findings.add("error", "attribute", f"{key} must be a whole number, got {value!r}", site)
        elif key in ("annotation", "label_kind") and not isinstance(value, (str, bytes)):
            findings.add("error", "attribute", f"{key} must be text, got {value!r}", site)


def read_frames(file: h5py.File, path: Path, root: Root, findings: Findings) -> list[Frame]:
    """Every site, then the pooled groups. Raises UserError where there is no site at all."""
    groups = [(group, False) for group in site_groups(file, path)]
    pooled = [(key, True) for key in sorted(file) if key == CENTRAL or key.startswith(f"{CENTRAL}_")]
    frames = []
    for group, central in [*groups, *pooled]:
        node = file[group] if group else file
        if not isinstance(node, h5py.Group):
            findings.add("error", "layout", f"{group} must be a group")
            continue
        given = [holder.attrs.get(key, "") for holder, key in ((node, "site_name"), (file, "name"))]
        if not all(isinstance(name, (str, bytes)) for name in given):
            findings.add("error", "site_name", "site_name (and name of the file) must be text", group)
        first, last = (name if isinstance(name, str) else "" for name in given)
        name = first or group or last or path.stem
        frames.append(_read_frame(node, Frame(group, name, central), root, findings))
    times = Counter(frame.name for frame in frames if not frame.central)
    for name in [name for name, count in times.items() if count > 1]:
        findings.add("error", "site_name", f"{times[name]} sites have this name; names must differ", name)
    return frames


def _read_frame(node: h5py.Group, frame: Frame, root: Root, findings: Findings) -> Frame:
    where = f"site {frame.name!r}"
    _check_attributes(node, frame.name if frame.group else "", findings)
    for key in node:
        if _elsewhere(node, key):
            findings.add("error", "elsewhere", f"{key} lies in another file; copy it into this one", frame.name)
        elif _scalar(node.get(key)):
            findings.add("error", "layout", f"{key} is a single value, expected an array", frame.name)
    image = own_dataset(node, "image")
    names = [name for name in ANNOTATIONS if own_dataset(node, name) is not None]
    # Asked one by one, because the reader stops at the first that does not fit; what all have in common is found once.
    fits = [_fits(image, node, chosen, where, root, frame, findings) for chosen in ([[name] for name in names] or [[]])]
    if image is None or image.ndim not in (3, 4):
        return frame
    frame.annotations = [name for name, fine in zip(names, fits, strict=False) if fine]
    frame.size = int(image.shape[0])
    frame.splits = _splits(node, frame, where, findings)
    if root.task is not None and names and not any(_scalar(node.get(name)) for name in ANNOTATIONS):
        try:
            frame.training = choose_annotation(node, "auto", where, root.task)
        except UserError as error:
            if len(frame.annotations) == len(names):  # else its shape is wrong, which is said already
                findings.add("error", "annotation", _short(error, where), frame.name)
    kind = node.attrs.get("label_kind", frame.training)
    frame.label_kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    return frame


def own_dataset(node: h5py.Group, key: str) -> h5py.Dataset | None:
    """The dataset of a group whose values lie in this very file; None where there is none, or a single value."""
    found = None if _elsewhere(node, key) else node.get(key)
    return found if isinstance(found, h5py.Dataset) and not _scalar(found) else None


def _scalar(node: Any) -> bool:
    return isinstance(node, h5py.Dataset) and not node.shape


def _elsewhere(node: h5py.Group, key: str) -> bool:
    """Whether an entry only points into another file, which is not there where this one is sent."""
    if isinstance(node.get(key, getlink=True), h5py.ExternalLink):
        return True
    found = node.get(key)
    return isinstance(found, h5py.Dataset) and bool(found.is_virtual or found.external)


def _fits(
    image: h5py.Dataset | None,
    node: h5py.Group,
    chosen: Sequence[str],
    where: str,
    root: Root,
    frame: Frame,
    findings: Findings,
) -> bool:
    """Whether `image` and the `chosen` annotations have the shapes and types the reader asks for; else a finding.

    What the root does not say is taken from the site, so that one missing attribute is one finding.
    """
    found: tuple[int, ...] = image.shape if image is not None and image.ndim in (3, 4) else (0, 0, 0)
    size = root.size or (int(found[1]), int(found[2]))
    channels = len(root.channels) if root.channels else int(found[3]) if len(found) == 4 else 1
    label = own_dataset(node, "label")
    classes = len(root.classes) if root.classes else int(label.shape[1]) if label is not None and label.ndim == 2 else 1
    seen = {"image": image, **{name: node[name] for name in chosen}}
    try:
        check_header(cast(h5py.Group, seen), where, root.task or "", classes, size, channels)
    except UserError as error:
        findings.add("error", "layout", _short(error, where), frame.name)
        return False
    return True


def _splits(node: h5py.Group, frame: Frame, where: str, findings: Findings) -> dict[str, np.ndarray]:
    """Splits by the reader's rules; where they are broken, an error and as much of them as makes sense."""
    try:
        return {split: rows.astype(np.int64) for split, rows in read_splits(node, where, frame.size).items()}
    except UserError as error:
        findings.add("error", "splits", _short(error, where), frame.name)
    free = np.ones(frame.size, dtype=bool)
    splits = {}
    for split in SPLITS:
        key = f"{split}_idx"
        given = np.asarray(node.attrs[key] if key in node.attrs else node.get(key, ())).reshape(-1)
        rows = np.unique(given).astype(np.int64) if np.issubdtype(given.dtype, np.integer) else np.empty(0, np.int64)
        rows = rows[(rows >= 0) & (rows < frame.size)]
        splits[split] = rows[free[rows]]
        free[rows] = False
    return splits


def _short(error: UserError, where: str) -> str:
    return str(error).removeprefix(f"{where}: ")
