"""Format `images`: folders of PNG, JPEG, TIFF or BMP pictures with masks, scribbles, a label table, or a folder per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import fit_image, fit_mask
from data_prep.importers.folders import Key, by_key, level_of, list_files, matcher, part_of, readable, split_of, spread
from data_prep.importers.image_params import FOLDER, IMAGES, MASKS, ImagesParams
from data_prep.importers.labels import ImageTable, Labelled, from_column, from_columns, from_folders
from data_prep.importers.levels import default_classes, to_classes, to_scribble
from data_prep.importers.scaling import equal_channels, grey_of
from data_prep.importers.tables import is_absent
from fedmed.data.formats.limits import BadFile
from fedmed.data.formats.pictures import PICTURE_SUFFIXES, picture_size, read_levels, read_picture
from fedmed.errors import UserError

_LOOKED_AT = 16  # pictures read to find out whether they are grey


class Images:
    """Pictures of a folder; one entry per picture."""

    Params: ClassVar[type[ImagesParams]] = ImagesParams

    def __init__(self, source: Path, params: ImagesParams, size: tuple[int, int] | None) -> None:
        """source: the folder; size: (H, W) that all images get, None: as they are."""
        self._source, self._params, self._size = source, params, size
        self._classes: tuple[str, ...] = ()
        self._has_masks = self._has_scribbles = self._grey = False

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Pair images with masks, scribbles and table rows."""
        params = self._params
        files = list_files(self._source)
        masks = self._annotations(files, params.masks, params.mask_suffix, skipped, "mask")
        scribbles = self._annotations(files, params.scribbles, "", skipped, "scribble")
        taken = {*masks.values(), *scribbles.values()}
        images = self._images([path for path in files if path not in taken], skipped)
        paths = list(images.values())
        is_table = params.labels not in (None, FOLDER)
        table = ImageTable(self._beside(str(params.labels)), params.image_column, paths) if is_table else None
        task = params.task
        self._has_masks = bool(masks) and task in ("auto", "segmentation")
        self._has_scribbles = bool(scribbles) and task in ("auto", "segmentation")
        labelled: Labelled | None = None
        if self._has_masks or self._has_scribbles:
            task = "segmentation"
            found = [self._source / path for path in masks.values()]
            self._classes = params.classes or default_classes(found, params.mask_values, params.mask_threshold)
        else:
            labelled = self._labels(paths, table)
            task, self._classes = labelled.task, labelled.classes
        entries = []
        for key, path in images.items():
            parts = [path]
            reason = ""
            for has, known, name in ((self._has_masks, masks, "mask"), (self._has_scribbles, scribbles, "scribble")):
                if has and key not in known:
                    reason = f"image without a {name}"
                elif has:
                    parts.append(known.pop(key))
            label = labelled.labels[path] if labelled else None
            reason = label if isinstance(label, str) else reason
            entry = self._entry(path, parts, {} if label is None else {"label": label}, table)
            if isinstance(entry, str) or reason:
                skipped.add(self._source / path, reason or str(entry))
            else:
                entries.append(entry)
        for known, has, name in ((masks, self._has_masks, "mask"), (scribbles, self._has_scribbles, "scribble")):
            for path in known.values() if has else ():
                skipped.add(self._source / path, f"{name} without an image")
        self._grey = self._is_grey(entries)
        channels = ("grey",) if self._grey else ("R", "G", "B")
        attrs = {"ignore_value_in_scribble": len(self._classes)} if self._has_scribbles else {}
        remarks = (
            () if params.group is not None else ("each image counts as a patient of its own; group= says whose it is",)
        )
        return Header(task, self._classes, channels, attrs, remarks), entries

    def look(self, entry: Entry) -> tuple[int, int]:
        """Size of the picture from its header."""
        return picture_size(entry.files[0])

    def read(self, entry: Entry) -> list[Row]:
        """The picture with its mask and scribble."""
        image = self._in_colour(read_picture(entry.files[0]))
        arrays = {"image": image}
        annotations = list(entry.files[1:])
        params, number = self._params, len(self._classes)
        if self._has_masks:
            levels = _levels(annotations.pop(0), image, self._size)
            mask = to_classes(levels, number, params.mask_values, params.mask_threshold)
            arrays["mask"] = mask if self._size is None else fit_mask(mask, self._size, params.fit, params.mask_rule)
        if self._has_scribbles:
            drawn = to_scribble(_levels(annotations.pop(0), image, self._size), number, params.scribble_values)
            if self._size is not None:
                drawn = fit_mask(drawn, self._size, params.fit, "majority", ignore=number, fill=number)
            arrays["scribble"] = drawn
        if self._size is not None:
            arrays["image"] = fit_image(image, self._size, params.fit, params.filter)
        return [Row(arrays, entry.values)]

    def _images(self, files: list[str], skipped: Skipped) -> dict[Key, str]:
        spec = self._params.images
        key = matcher(spec)
        if spec == IMAGES and not any(key(path) for path in files):
            files = [path for path in files if path.casefold().endswith(PICTURE_SUFFIXES)]
            key = matcher(".")
        found = by_key(self._source, files, key, PICTURE_SUFFIXES, skipped, "image")
        if not found:
            raise UserError(f"{self._source}: no picture ({', '.join(PICTURE_SUFFIXES)}) lies where images={spec} says")
        return found

    def _annotations(
        self, files: list[str], spec: str | None, suffix: str, skipped: Skipped, what: str
    ) -> dict[Key, str]:
        """Masks or scribbles by key; an error where a place was named and nothing lies there."""
        if spec is None:
            return {}
        found = by_key(self._source, files, matcher(spec, suffix), PICTURE_SUFFIXES, skipped, what)
        asked = spec != MASKS or suffix or self._params.task == "segmentation"
        if not found and asked:
            ending = f" with names that end in {suffix}" if suffix else ""
            raise UserError(f"{self._source}: no {what} lies where {what}s={spec} says{ending}")
        return found

    def _labels(self, images: list[str], table: ImageTable | None) -> Labelled:
        params = self._params
        if table is not None and params.label_columns:
            return from_columns(table, images, params.label_columns, params.task, params.classes)
        if table is not None:
            return from_column(
                table, images, params.label_column, params.task, params.classes, params.label_sign, params.label_none
            )
        if params.labels == FOLDER:
            return from_folders({path: self._class_folder(path) for path in images}, params.classes)
        raise UserError(
            f"{self._source}: no annotation. Give masks=FOLDER, scribbles=FOLDER or labels=FILE.csv; labels=folder where each folder "
            "holds one class (its name will stand in the site file)"
        )

    def _class_folder(self, path: str) -> str:
        """First folder on the way that is neither split, site nor the folder of images."""
        site = self._params.site or ""
        level = int(site) if site.isdecimal() else 0
        folders = [folder for number, folder in enumerate(path.split("/")[:-1], 1) if number != level]
        left = (folder for folder in folders if not split_of(f"{folder}/") and folder != self._params.images)
        return readable(next(left, ""))

    def _entry(self, path: str, parts: list[str], values: Mapping[str, Any], table: ImageTable | None) -> Entry | str:
        """The entry of an image, or why it has none."""
        params = self._params
        by_level = params.site is not None and params.site.isdecimal()
        site = group = ""
        if params.site is not None:
            site = level_of(path, int(params.site)) if by_level else _cell(table, path, params.site, "site")
            if not site:
                return "no site in its row or path"
        if params.group is None:
            group = path
        elif "(" in params.group:
            group = part_of(path, params.group)
            group = f"{site}/{group}" if group and by_level else group
        else:
            group = _cell(table, path, params.group, "group")
        if not group:
            return "no patient in its row or name"
        split = split_of(path)
        if params.split_column is not None:
            split = split_of(f"{_cell(table, path, params.split_column, 'split_column')}/")
        return Entry(site, path, group, tuple(self._source / part for part in parts), split, values)

    def _beside(self, path: str) -> Path:
        """A file named by the user: below the source, else as it stands."""
        below = self._source / path
        return below if below.is_file() else Path(path).expanduser()

    def _is_grey(self, entries: Sequence[Entry]) -> bool:
        if self._params.colour != "auto":
            return self._params.colour == "grey"
        for entry in spread(entries, _LOOKED_AT):
            try:
                if not equal_channels(read_picture(entry.files[0])):
                    return False
            except BadFile:
                continue
        return True

    def _in_colour(self, image: np.ndarray) -> np.ndarray:
        """The picture as grey (H, W) or colour (H, W, 3), as all of them are. Raises `BadFile` for colour among grey ones."""
        if not self._grey:
            return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        grey = grey_of(image, mixed=self._params.colour != "auto")
        if grey is None:
            raise BadFile("colour among grey images (colour=rgb or colour=grey takes both)")
        return grey


def _cell(table: ImageTable | None, path: str, column: str, argument: str) -> str:
    if table is None:
        raise UserError(f"{argument}={column} names a column; give the table too, labels=FILE.csv")
    cell = table.cell(path, column)
    return "" if is_absent(cell) else cell


def _levels(path: Path, image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """A mask that fits its image: of the same size, or with a size asked for of the same shape (to 1 %)."""
    levels = read_levels(path)
    (height, width), (rows, columns) = image.shape[:2], levels.shape
    if size is None and levels.shape != image.shape[:2]:
        raise BadFile("mask and image differ in size (--size brings both to one)")
    if abs(height * columns - width * rows) > 0.01 * width * rows:
        raise BadFile("mask and image differ in shape")
    return levels
