"""DICOM images: the series of a folder, their slices in order, values as float32.

Reads files with the DICM mark: CT, MR, PET, radiographs, ultrasound, single or multi-frame. Uncompressed, deflated (bounded), RLE, JPEG baseline and
JPEG 2000 need nothing further; JPEG-LS needs pyjpegls, which the extra `dicom` brings; other syntaxes whatever pydicom finds installed.
Tables of a window (VOI LUT) are not applied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedmed.data.formats.dicom_header import Group, read_image_file
from fedmed.data.formats.dicom_pixels import Frame, ImageFile, Window, read_frame
from fedmed.data.formats.limits import DEFAULT_LIMITS, BadFile, Limits, bad_file
from fedmed.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)
class Series:
    """Slices of one image in order of place. Its repr names neither files nor patient.

    files: the distinct files in order; modality such as "CT"; spacing: mm between (slices, rows, columns), 1.0 where the files do not say;
    size (H, W); channels 1 or 3; patient, study, uid (of the series): raw identifiers, "" where missing, for grouping only, never to be written or shown.
    """

    files: tuple[Path, ...]
    modality: str
    spacing: tuple[float, float, float]
    size: tuple[int, int]
    channels: int
    patient: str
    study: str
    uid: str
    images: tuple[ImageFile, ...]
    frames: tuple[Frame, ...]
    limits: Limits = field(default=DEFAULT_LIMITS)

    def __repr__(self) -> str:
        return f"Series({self.modality}, {len(self)} x {self.size[0]} x {self.size[1]})"

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, index: int, window: str | tuple[float, float] | None = None) -> np.ndarray:
        """Slice `index`, (H, W) or (H, W, 3) float32.

        window None: values after the modality rescale (CT: Hounsfield units), MONOCHROME1 turned round; (centre, width) in those values or "auto" (the
        window of the file, else from least to greatest value): 0..255. Raises `BadFile`; IndexError and ValueError for the arguments.
        """
        frame = self.frames[index]
        chosen: str | Window | None = None
        if isinstance(window, str):
            if window != "auto":
                raise ValueError(f'window must be None, (centre, width) or "auto", got {window!r}')
            chosen = window
        elif window is not None:
            centre, width = map(float, window)
            if not (np.isfinite(centre) and np.isfinite(width) and width >= 1):
                raise ValueError(f"a window needs a width of at least 1, got centre {centre:g} and width {width:g}")
            chosen = (centre, width, "LINEAR")
        with bad_file("DICOM file"):
            return read_frame(self.images[frame.file], frame, chosen, self.limits)


def find_series(
    folder: str | Path, limits: Limits = DEFAULT_LIMITS, on_bad: Callable[[Path, str], None] | None = None
) -> list[Series]:
    """All series of images under a folder (or in one file), in order of their first file's path.

    Files are grouped by patient, series, size, samples and orientation; each multi-frame file is a series of its own. Slices are sorted by place along
    the normal when all have one, else by instance number. Pixels are not read. on_bad(file, reason) is called for every file left out: damaged, no DICOM,
    no image (reports, plans, segmentations, dose), a second copy. Raises UserError when there is no such folder.
    """
    root = Path(folder)
    if not root.exists():
        raise UserError(f"{root} does not exist; give a folder with DICOM files.")
    groups: dict[Group, list[tuple[ImageFile, list[Frame]]]] = {}
    seen: set[str] = set()
    for path in _walk(root):
        try:
            with bad_file("DICOM file"):
                group, image, frames = read_image_file(path, limits)
                if group.instance and group.instance in seen:
                    raise BadFile("a second copy of an image")
        except BadFile as error:
            if on_bad is not None:
                on_bad(path, str(error))
            continue
        seen.add(group.instance)
        groups.setdefault(group, []).append((image, frames))
    return [_series(group, members, limits) for group, members in groups.items()]


def _walk(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            yield Path(folder, name)


def _series(group: Group, members: list[tuple[ImageFile, list[Frame]]], limits: Limits) -> Series:
    frames = [
        Frame(number, frame.number, frame.instance, frame.position, frame.slope, frame.intercept, frame.window)
        for number, (_, found) in enumerate(members)
        for frame in found
    ]
    places = _places(frames, group)
    if places is not None:
        order = sorted(range(len(frames)), key=lambda i: (round(places[i], 3), _instance(frames[i]), i))
    else:
        order = sorted(range(len(frames)), key=lambda i: (_instance(frames[i]), i))
    images = tuple(image for image, _ in members)
    between = group.between
    if places is not None:
        steps = np.diff(np.unique(np.round(places, 3)))
        between = float(np.median(steps)) if len(steps) else between
    return Series(
        files=tuple(dict.fromkeys(images[frames[i].file].path for i in order)),
        modality=group.modality,
        spacing=(between, *group.spacing),
        size=group.size,
        channels=group.channels,
        patient=group.patient,
        study=group.study,
        uid=group.uid,
        images=images,
        frames=tuple(frames[i] for i in order),
        limits=limits,
    )


def _instance(frame: Frame) -> tuple[bool, int, int]:
    """Sort key: by instance number, frames of one file in their order, slices without a number last."""
    return frame.instance is None, frame.instance or 0, frame.number


def _places(frames: list[Frame], group: Group) -> list[float] | None:
    """Distance of each slice along the normal of the series, in mm; None unless every slice has a place."""
    if group.orientation is None or any(frame.position is None for frame in frames):
        return None
    rows, columns = np.array(group.orientation[:3]), np.array(group.orientation[3:])
    normal = np.cross(rows, columns)
    return [float(np.dot(normal, np.array(frame.position))) for frame in frames]
