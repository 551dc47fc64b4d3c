"""Checks of a site file; each failure is one `UserError` that says what was expected, what came, where, and what to do.

Shapes and attributes only, read for every site when a file is opened; values of annotations are the business of `label_checks`.
Letters: N items, H W pixels, L classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedmed.config import nearest
from fedmed.errors import UserError

LAYOUT = "fedmed-data-1"
TASKS = ("segmentation", "classification", "multilabel")
SPLITS = ("train", "val", "test")
ANNOTATIONS = ("mask", "label", "scribble", "box")  # the order in which "auto" looks for one
ROOT = "the root attributes task, classes, channels, image_size and layout_version"
IMAGE_TYPES = ("uint8", "uint16", "float16", "float32")


def open_hdf5(path: Path) -> h5py.File:
    """Open `path` read-only, or say why that cannot be."""
    if not path.exists():
        raise UserError(
            f"No site file at {path}. Check data.path (or use phantom:segmentation for embedded synthetic sites)."
        )
    if path.is_dir() or not h5py.is_hdf5(path):
        kind = "a folder" if path.is_dir() else "not an HDF5 file"
        raise UserError(f"{path} is {kind}; data.path must name an HDF5 site file. Convert other formats first.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5 ({error}). Copy or export it again.") from error


def read_json(attrs: h5py.AttributeManager, key: str, path: Path) -> Any:
    """Read a root attribute that holds JSON (a list or an object); a plain array is taken as a list."""
    if key not in attrs:
        raise UserError(f"{path} is not a site file: root attribute {key!r} is missing. It needs {ROOT}.")
    value = attrs[key]
    if isinstance(value, np.ndarray):
        return [v.decode() if isinstance(v, bytes) else v for v in value.tolist()]
    try:
        return json.loads(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: root attribute {key!r} must hold JSON, got {value!r}. Write it with json.dumps."
        ) from error


def site_groups(file: h5py.File, path: Path) -> list[str]:
    """Groups of the sites in sorted order; [""] for a file with one site at its root."""
    groups = sorted(name for name in file if name.startswith("site_") and isinstance(file[name], h5py.Group))
    if groups:
        return groups
    if "image" in file:
        return [""]
    found = ", ".join(sorted(file)[:5]) or "nothing"
    raise UserError(
        f"{path} is HDF5 but not a site file: expected groups site_* or a dataset image at the root, found {found}. "
        f"A site file also needs {ROOT}."
    )


def check_header(
    group: h5py.Group, where: str, task: str, num_classes: int, image_size: tuple[int, int], channels: int
) -> None:
    """Check shapes and types of one site without reading pixels."""
    image = group.get("image")
    if not isinstance(image, h5py.Dataset):
        raise UserError(f"{where}: dataset image is missing. A site needs image (N x H x W, or N x H x W x C).")
    shape = tuple(image.shape)
    if image.dtype.name not in IMAGE_TYPES:
        raise UserError(
            f"{where}: image is {image.dtype}, expected one of {', '.join(IMAGE_TYPES)}. "
            "Convert it before writing the file."
        )
    if len(shape) not in (3, 4):
        raise UserError(
            f"{where}: image has shape {shape}, expected N x H x W or N x H x W x C. "
            "Store volumes as slices with group_id."
        )
    if shape[1:3] != image_size:
        raise UserError(
            f"{where}: image is {shape[1]} x {shape[2]}, image_size says {image_size[0]} x {image_size[1]}. "
            "Make them agree."
        )
    found = shape[3] if len(shape) == 4 else 1
    if found != channels:
        raise UserError(
            f"{where}: image has {found} channels, the attribute channels names {channels}. Make them agree."
        )
    present = [name for name in ANNOTATIONS if name in group]
    if not present:
        raise UserError(
            f"{where}: no annotation; expected at least one of {', '.join(ANNOTATIONS)}. Add it to the site group."
        )
    for name in present:
        _check_annotation_shape(tuple(group[name].shape), name, shape, where, task, num_classes)


def _check_annotation_shape(
    shape: tuple[int, ...], name: str, image: tuple[int, ...], where: str, task: str, num_classes: int
) -> None:
    if shape[:1] != image[:1]:
        raise UserError(f"{where}: {name} has {shape[0]} entries, image has {image[0]}. Write one {name} per image.")
    if name in ("mask", "scribble") and shape != image[:3]:
        raise UserError(
            f"{where}: {name} has shape {shape}, image {image}: expected {name} of {image[:3]}. "
            f"Resize {name} (nearest neighbour) to the image."
        )
    if name == "label" and task == "classification" and len(shape) != 1:
        raise UserError(
            f"{where}: label has shape {shape}, classification expects ({image[0]},). "
            "Use task multilabel for 0/1 columns."
        )
    if name == "label" and task == "multilabel" and shape != (image[0], num_classes):
        raise UserError(
            f"{where}: label has shape {shape}, expected ({image[0]}, {num_classes}): a 0/1 column per name in classes."
        )


def read_splits(group: h5py.Group, where: str, num_items: int) -> dict[str, np.ndarray]:
    """Split indices (int32 arrays) of a site from attributes, or datasets when they are too long for one; in range and
    disjoint.
    """
    splits: dict[str, np.ndarray] = {}
    owner = np.full(num_items, -1, dtype=np.int8)
    for code, name in enumerate(SPLITS):
        key = f"{name}_idx"
        if key in group.attrs:
            indices = np.asarray(group.attrs[key]).reshape(-1)
        elif key in group:
            indices = np.asarray(group[key]).reshape(-1)
        elif name == "val":
            indices = np.zeros(0, dtype=np.int32)
        else:
            raise UserError(
                f"{where}: split attribute {key} is missing. "
                "Write train_idx, val_idx and test_idx as integer index arrays."
            )
        if indices.size == 0:
            indices = indices.astype(np.int32)
        if not np.issubdtype(indices.dtype, np.integer):
            raise UserError(
                f"{where}: {key} is {indices.dtype}, expected integers 0 .. {num_items - 1}. Write it as int32."
            )
        if indices.size and (indices.min() < 0 or indices.max() >= num_items):
            worst = int(indices.min() if indices.min() < 0 else indices.max())
            raise UserError(
                f"{where}: {key} contains {worst}, but the site has {num_items} images (0 .. {num_items - 1}). "
                "Rebuild the split."
            )
        if np.unique(indices).size != indices.size:
            raise UserError(f"{where}: {key} lists an image twice. Every image belongs to one split, once.")
        taken = indices[owner[indices] >= 0]
        if taken.size:
            other = SPLITS[int(owner[taken[0]])]
            raise UserError(
                f"{where}: image {int(taken[0])} is in both {other}_idx and {key} ({taken.size} such). "
                "Make the splits disjoint."
            )
        owner[indices] = code
        splits[name] = indices.astype(np.int32, copy=False)
    return splits


def choose_annotation(group: h5py.Group, asked: str, where: str, task: str) -> str:
    """Name of the dataset training reads: `asked`, or with "auto" the group's attribute `annotation`, else the first
    usable one.
    """
    usable = {"segmentation": ("mask", "scribble", "box")}.get(task, ("label",))
    if asked == "auto":
        named = group.attrs.get("annotation")
        if named is not None:
            asked = named.decode() if isinstance(named, bytes) else str(named)
        else:
            asked = next((name for name in usable if name in group), "")
    if asked in group:
        shape, image = tuple(group[asked].shape), tuple(group["image"].shape)
        fits = shape == image[:3] if task == "segmentation" else asked == "label"
        if fits:
            return asked
        need = f"one of shape {image[:3]}" if task == "segmentation" else "label"
        raise UserError(
            f"{where}: annotation {asked!r} of shape {shape} cannot train {task}; that needs {need}. "
            "Set data.annotation."
        )
    there = [name for name in group if name in ANNOTATIONS]
    hint = nearest(asked, there) if asked else f"; known: {', '.join(there)}"
    raise UserError(f"{where}: data.annotation finds no {asked or ' or '.join(usable)!r} to train {task}{hint}")
