"""Format `nifti`: volumes as *.nii or *.nii.gz with masks of the same shape, stored slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import Fit, choose, fit_image, fit_mask, fitted_spacing
from data_prep.importers.folders import Key, by_key, check_pattern, level_of, list_files, matcher, part_of, split_of
from data_prep.importers.levels import check_values, lookup
from data_prep.importers.scaling import TYPES, as_they_are, check_window, percentiles, scaled
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.nifti import Nifti
from fedmed.errors import UserError

ENDINGS = (".nii", ".nii.gz")
IMAGES = "images"
T = TypeVar("T")


@dataclass(frozen=True)
class NiftiParams(Fit):
    """Where volumes and masks are found, how they are cut and scaled."""

    images: str = IMAGES  # folder's name or pattern (*/*_t1.nii.gz); all volumes where no folder is called images
    masks: str = "masks"  # the same of the masks; "." for beside the images (with mask_suffix)
    mask_suffix: str = ""  # what the name of a mask has in addition, such as _seg
    contrasts: tuple[str, ...] = ()  # endings of names that tell contrasts of a case apart (_flair,_t1): its channels
    axis: int = 2  # slices are cut across this axis of the stored array, 0..2
    slices: str = "all"  # which are taken: "all", "image" (those that are not constant) or "mask" (with foreground)
    scale: str = "percentiles"  # intensities: by "percentiles" of the volume, by "window", or "none" (as they are)
    percentiles: tuple[float, ...] = (0.5, 99.5)  # become 0 and the largest value, per volume and contrast, 0..100
    window: tuple[float, ...] | None = None  # [centre, width] in stored values (CT: HU), for scale=window
    dtype: str = "uint8"  # of the images: "uint8", "uint16" or "float16" (scaled: 0..1)
    classes: tuple[str, ...] = ("background", "foreground")  # names in the order of ids, background first
    mask_values: dict[str, int] | None = None  # {value: class id, ...}; null: the values are the ids
    same_space: bool = True  # image and mask must have the same affine; false: the same shape is enough
    group: str | None = None  # patient: pattern with one (...) searched in the path; null: each volume its own
    site: int | None = None  # several sites: level of the folder that names them (1: below the source); null: one site
    modality: str = ""  # written into the file, such as MR

    PRIVATE: ClassVar[tuple[str, ...]] = ("images", "masks", "mask_suffix", "group", "site")

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        choose("slices", self.slices, ("all", "image", "mask"))
        choose("scale", self.scale, ("percentiles", "window", "none"))
        choose("dtype", self.dtype, TYPES)
        check_window(self.window)
        check_values("mask_values", self.mask_values)
        if self.axis not in (0, 1, 2):
            raise ValueError(f"axis: expected 0, 1 or 2, got {self.axis}")
        if (self.scale == "window") != (self.window is not None):
            raise ValueError("scale=window and window=[centre, width] belong together")
        low, high = self.percentiles if len(self.percentiles) == 2 else (1.0, 0.0)
        if not 0 <= low < high <= 100:
            raise ValueError(
                f"percentiles: expected [low, high] with 0 <= low < high <= 100, got {list(self.percentiles)}"
            )
        if not 2 <= len(self.classes) <= 254:
            raise ValueError(f"classes: expected 2 to 254, background first, got {len(self.classes)}")
        if self.group is not None:
            check_pattern("group", self.group)

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Intensities of one contrast (X, Y, Z) in the type of the images, as `scale` says. Raises `BadFile`."""
        if self.scale == "none":
            return as_they_are(values, self.dtype)
        if self.window is not None:
            centre, width = self.window
            return scaled(values, centre - width / 2, centre + width / 2, self.dtype)
        return scaled(values, *percentiles(values, self.percentiles), self.dtype)


class NiftiVolumes:
    """Volumes of a folder; one entry per case, one row per slice."""

    Params: ClassVar[type[NiftiParams]] = NiftiParams

    def __init__(self, source: Path, params: NiftiParams, size: tuple[int, int] | None) -> None:
        """source: the folder; size: (H, W) that all slices get, None: as they are."""
        self._source, self._params, self._size = source, params, size

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Pair volumes, contrasts and masks; headers are read for the number of slices."""
        params = self._params
        files = list_files(self._source)
        masks = by_key(self._source, files, matcher(params.masks, params.mask_suffix), ENDINGS, skipped, "mask")
        if not masks:
            raise UserError(
                f"{self._source}: no mask (.nii, .nii.gz) lies where masks={params.masks} mask_suffix={params.mask_suffix!r} says; "
                "a site file needs masks"
            )
        taken = set(masks.values())
        cases, channels = self._cases([path for path in files if path not in taken], skipped)
        entries = []
        for key, paths in cases.items():
            if key not in masks:
                skipped.add(self._source / paths[0], "volume without a mask")
                continue
            entry = self._entry(paths, masks.pop(key))
            if isinstance(entry, str):
                skipped.add(self._source / paths[0], entry)
            else:
                entries.append(entry)
        for path in masks.values():
            skipped.add(self._source / path, "mask without a volume")
        channels = channels or self._channels(entries)
        attrs = {"modality": params.modality} if params.modality else {}
        remarks = () if params.group else ("each volume counts as a patient of its own; group= says whose it is",)
        return Header("segmentation", params.classes, channels, attrs, remarks), entries

    def look(self, entry: Entry) -> tuple[int, int]:
        """Size of the slices from the header."""
        return self._plane(Nifti.open(entry.files[0]).shape)

    def read(self, entry: Entry) -> list[Row]:
        """All slices that are asked for."""
        params = self._params
        *paths, mask_path = entry.files
        volumes = [Nifti.open(path) for path in paths]
        stored_mask = Nifti.open(mask_path)
        for other in (*volumes[1:], stored_mask):
            self._check_same(volumes[0], other)
        mask = self._mask(stored_mask.volume())
        image = np.stack([params.scaled(plane) for volume in volumes for plane in _contrasts(volume.volume())], axis=-1)
        spacing = fitted_spacing(self._plane(volumes[0].spacing), self._plane(image.shape), self._size, params.fit)
        rows = []
        for number in range(image.shape[params.axis]):
            picture, levels = (np.take(array, number, axis=params.axis) for array in (image, mask))
            if (params.slices == "mask" and not levels.any()) or (params.slices == "image" and np.ptp(picture) == 0):
                continue
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
            if self._size is not None:
                picture = fit_image(picture, self._size, params.fit, params.filter)
                levels = fit_mask(levels, self._size, params.fit, params.mask_rule)
            arrays = {"image": np.ascontiguousarray(picture), "mask": np.ascontiguousarray(levels)}
            rows.append(Row(arrays, {"slice_no": np.int32(number), "spacing": spacing}, number))
        return rows

    def _plane(self, values: Sequence[T]) -> tuple[T, T]:
        """Height and width (or their spacing) of a slice from those of the volume."""
        kept = [values[axis] for axis in range(3) if axis != self._params.axis]
        return kept[0], kept[1]

    def _cases(self, files: list[str], skipped: Skipped) -> tuple[dict[Key, list[str]], tuple[str, ...]]:
        """Files of each case in the order of the contrasts, and the names of the channels, () where the headers say how many there are."""
        spec, endings = self._params.images, self._params.contrasts
        if spec == IMAGES and not any(matcher(spec)(path) for path in files):
            spec = "."
            files = [path for path in files if path.casefold().endswith(ENDINGS)]
        found = [
            by_key(self._source, files, matcher(spec, ending), ENDINGS, skipped, "volume")
            for ending in endings or ("",)
        ]
        if not any(found):
            raise UserError(f"{self._source}: no volume (.nii, .nii.gz) lies where images={spec} says")
        for key in sorted(set().union(*found)):
            if any(key not in contrast for contrast in found):
                path = next(contrast[key] for contrast in found if key in contrast)
                skipped.add(self._source / path, "case without all contrasts")
        whole = sorted(set.intersection(*(set(contrast) for contrast in found)))
        return {key: [contrast[key] for contrast in found] for key in whole}, tuple(e.strip("_-. ") for e in endings)

    def _entry(self, paths: list[str], mask: str) -> Entry | str:
        params, path = self._params, paths[0]
        site = "" if params.site is None else level_of(path, params.site)
        if params.site is not None and not site:
            return "in no folder of a site"
        group = path
        if params.group is not None:
            group = part_of(path, params.group)
            if not group:
                return "no patient in its name"
            group = f"{site}/{group}" if site else group
        files = tuple(self._source / part for part in (*paths, mask))
        try:
            count = Nifti.open(files[0]).num_slices(params.axis)
        except BadFile as error:
            return str(error)
        return Entry(site, path, group, files, split_of(path), rows=count)

    def _channels(self, entries: Sequence[Entry]) -> tuple[str, ...]:
        """Names of the channels: the fourth axis of the first volume, numbered."""
        count = Nifti.open(entries[0].files[0]).channels if entries else 1
        name = self._params.modality or "intensity"
        return (name,) if count == 1 else tuple(f"{name} {number}" for number in range(count))

    def _check_same(self, first: Nifti, other: Nifti) -> None:
        if tuple(other.shape[:3]) != tuple(first.shape[:3]):
            raise BadFile("volume and mask, or two contrasts, differ in shape")
        if self._params.same_space and not np.allclose(first.affine, other.affine, rtol=1e-3, atol=0.05):
            raise BadFile("volume and mask, or two contrasts, lie differently in space (same_space=false takes them)")

    def _mask(self, stored: np.ndarray) -> np.ndarray:
        """Class ids, uint8, of a stored mask (X, Y, Z), which may be of a float type."""
        if stored.ndim != 3:
            raise BadFile("mask of more than three dimensions")
        levels = as_they_are(stored, "uint16")
        if self._params.mask_values is not None:
            return lookup(levels, {int(level): number for level, number in self._params.mask_values.items()}, None)
        if levels.max(initial=0) >= len(self._params.classes):
            raise BadFile("mask with values that are no class (mask_values= maps them)")
        return levels.astype(np.uint8)


def _contrasts(volume: np.ndarray) -> list[np.ndarray]:
    """Volumes (X, Y, Z) of a stored one, which may have contrasts along a fourth axis."""
    if volume.ndim == 3:
        return [volume]
    return [volume[..., number] for number in range(volume.shape[3])]
