"""Masks and probabilities written in the format and geometry of their source, atomically.

Letters: n planes, H W height and width, F foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmed.data.formats.dicom import Series
from fedmed.data.formats.dicom_write import write_mask_like
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.nifti import Nifti, write_nifti_like
from fedmed.data.formats.pictures import write_picture
from fedmed.federation.case_files import write_arrays
from fedmed.predict.inputs import Source

_KEPT = {".tif": ".tif", ".tiff": ".tiff"}  # other pictures become PNG: JPEG would blur a mask, BMP is not written


def place(out: Path, source: Source, what: str, ending: str) -> Path:
    """Path of an output of a source."""
    path = out / source.name
    return path.with_name(f"{path.name}_{what}{ending}")


def levels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Class ids as they stand in a picture: with one foreground class 0 and 255."""
    return labels * np.uint8(255) if num_classes == 2 else labels


def write_masks_of_picture(
    out: Path, source: Source, labels: np.ndarray, prob: np.ndarray | None, num_classes: int
) -> str:
    """Mask (H, W) uint8 and, where given, each of the probabilities (F, H, W) as 16-bit PNG (65535: 1). Gives the ending of the mask."""
    ending = _KEPT.get(source.ending, ".png")
    write_picture(place(out, source, "mask", ending), levels(labels, num_classes))
    for number, one in enumerate(() if prob is None else prob, start=1):
        shares = np.rint(np.clip(np.nan_to_num(one), 0.0, 1.0) * 65535).astype(np.uint16)
        write_picture(place(out, source, f"probability_{number}", ".png"), shares)
    return ending


def write_masks_of_volume(
    out: Path, source: Source, like: Nifti, axis: int, labels: np.ndarray, prob: np.ndarray | None
) -> str:
    """Mask of slices (n, H, W) uint8 across `axis` where `like` lies; probabilities (n, F, H, W) float32 as a fourth axis."""
    write_nifti_like(place(out, source, "mask", source.ending), like, np.moveaxis(labels, 0, axis), np.uint8)
    if prob is not None:
        voxels = np.moveaxis(np.moveaxis(prob, 1, -1), 0, axis)
        write_nifti_like(place(out, source, "probability", source.ending), like, voxels, np.float32)
    return source.ending


def write_masks_of_series(
    out: Path,
    source: Source,
    labels: np.ndarray,
    prob: np.ndarray | None,
    classes: Sequence[str],
    with_patient: bool,
) -> str:
    """Slices (n, H, W) uint8 as a DICOM Segmentation; probabilities (n, F, H, W) float32 as .npz. Raises `BadFile` where the series lacks
    what a segmentation needs.
    """
    series = source.series
    assert isinstance(series, Series)
    try:
        write_mask_like(series, labels, classes, place(out, source, "mask", ".dcm"), with_patient)
    except BadFile as error:
        raise BadFile(f"{error}; convert it to NIfTI or pictures and predict these") from error
    if prob is not None:
        path = place(out, source, "probability", ".npz")
        write_arrays(path, {"probability": prob, "classes": np.array(list(classes[1:]))})
    return ".dcm"
