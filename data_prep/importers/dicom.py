"""Format `dicom`: a folder of DICOM series, labelled by a table; stored slice by slice, without a tag of the header but modality and spacing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.fit import FitImage, choose, fit_image, fitted_spacing
from data_prep.importers.folders import split_of
from data_prep.importers.labels import ImageTable, Labelled, from_column, from_columns
from data_prep.importers.scaling import TYPES, as_they_are, scaled
from fedmed.data.formats.dicom import Series, find_series
from fedmed.errors import UserError

WINDOWS = ("auto", "none")


@dataclass(frozen=True)
class DicomParams(FitImage):
    """Which series are taken, their labels, and how their values are scaled."""

    labels: str | None = None  # CSV with a row per series: its folder, or its file where it is a single image
    image_column: str = "image"  # column of that folder or file, as a path below the source
    label_column: str = "label"  # column of the class, or of classes joined by label_sign
    label_columns: tuple[str, ...] = ()  # instead: 0/1 columns, one per class
    label_sign: str = "|"  # joins classes; a table that has it is multi-label
    label_none: str = "No Finding"  # in a multi-label table, stands for no class
    task: str = "auto"  # classification or multilabel; auto: what the table shows
    classes: tuple[str, ...] = ()  # names in the order of ids; else as found, sorted
    modality: str = ""  # take only series of this modality, such as CT; empty: all
    min_slices: int = 1  # leave out shorter series (scouts), >= 1
    window: str = "auto"  # "auto" (of the file, else least to greatest), "none", or centre,width in values such as HU
    dtype: str = "uint8"  # of the images: "uint8", "uint16" or "float16" (0..1); window=none: the values as they are

    PRIVATE: ClassVar[tuple[str, ...]] = ("labels", "image_column", "label_column", "label_columns", "label_none")

    def __post_init__(self) -> None:
        """Check words and ranges."""
        super().__post_init__()
        choose("task", self.task, ("auto", "classification", "multilabel"))
        choose("dtype", self.dtype, TYPES)
        if self.min_slices < 1:
            raise ValueError(f"min_slices: expected 1 or more, got {self.min_slices}")
        self.limits()

    def limits(self) -> str | tuple[float, float]:
        """The window: "auto", "none" or (centre, width)."""
        if self.window in WINDOWS:
            return self.window
        try:
            centre, width = (float(part) for part in self.window.strip("[]").split(","))
        except ValueError:
            centre, width = 0.0, 0.0
        if not (np.isfinite(centre) and 1 <= width < np.inf):
            raise ValueError(
                f"window: expected auto, none, or centre,width with a width of at least 1, got {self.window!r}"
            )
        return centre, width


class DicomSeries:
    """Series of a folder; one entry per series, one row per slice."""

    Params: ClassVar[type[DicomParams]] = DicomParams

    def __init__(self, source: Path, params: DicomParams, size: tuple[int, int] | None) -> None:
        """source: the folder; size: (H, W) that all slices get, None: as they are."""
        self._source, self._params, self._size = source, params, size
        self._series: dict[str, Series] = {}

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Find the series and their labels; pixels are not read."""
        params = self._params
        if params.labels is None:
            raise UserError(
                "dicom: a site file needs an annotation; give labels=FILE.csv with a column for the folder of a series (or the file of a single "
                "image) and one for its class. Masks are imported from pictures (images) or NIfTI (nifti)"
            )
        below = self._source / params.labels
        table_path = below if below.is_file() else Path(params.labels).expanduser()
        found = find_series(
            self._source, on_bad=lambda path, reason: None if _same(path, table_path) else skipped.add(path, reason)
        )
        chosen = self._chosen(found, skipped)
        if not chosen:
            return Header("classification", params.classes, ("intensity",)), []
        table = ImageTable(table_path, params.image_column, list(chosen))
        uids = Counter(series.uid for series in chosen.values())
        labelled = self._labels(table, list(chosen))
        entries = []
        for place, series in chosen.items():
            label = labelled.labels[place]
            if isinstance(label, str):
                skipped.add(series.files[0], label)
                continue
            # by what the series itself says, so that its images keep their ids when others are added
            item = series.uid if series.uid and uids[series.uid] == 1 else f"{series.uid}\0{place}"
            self._series[item] = series
            split = split_of(series.files[0].relative_to(self._source).as_posix())
            group = series.patient or series.uid or place
            entries.append(Entry("", item, group, series.files, split, {"label": label}, len(series)))
        colour = next(iter(chosen.values())).channels == 3
        modalities = sorted({series.modality for series in chosen.values() if series.modality})
        nameless = sum(not series.patient for series in chosen.values())
        remarks = (f"{nameless} series name no patient; each counts as one of its own",) if nameless else ()
        channels = ("R", "G", "B") if colour else (modalities[0] if len(modalities) == 1 else "intensity",)
        attrs = {"modality": ", ".join(modalities)} if modalities else {}
        return Header(labelled.task, labelled.classes, channels, attrs, remarks), entries

    def look(self, entry: Entry) -> tuple[int, int]:
        """Size of the slices from the header."""
        return self._series[entry.item].size

    def read(self, entry: Entry) -> list[Row]:
        """All slices of a series."""
        series, params = self._series[entry.item], self._params
        window = params.limits()
        spacing = fitted_spacing(series.spacing[1:], series.size, self._size, params.fit)
        rows = []
        for number in range(len(series)):
            values = series.read(number, None if window == "none" else window)
            if window == "none":
                image = as_they_are(values, params.dtype)
            else:
                image = scaled(values, 0.0, 255.0, params.dtype)
            if self._size is not None:
                image = fit_image(image, self._size, params.fit, params.filter)
            values_of = {**entry.values, "slice_no": np.int32(number), "spacing": spacing}
            rows.append(Row({"image": image}, values_of, number))
        return rows

    def _chosen(self, found: Sequence[Series], skipped: Skipped) -> dict[str, Series]:
        """Series that are asked for, by the path they have in the table: their folder, or the file where that is the whole of them."""
        params = self._params
        kept = []
        for series in found:
            if params.modality and series.modality != params.modality:
                skipped.add(series.files[0], "series of another modality")
            elif len(series) < params.min_slices:
                skipped.add(series.files[0], "series of too few slices")
            else:
                kept.append(series)
        folders = Counter(series.files[0].parent for series in kept)
        chosen: dict[str, Series] = {}
        channels = Counter(series.channels for series in kept).most_common(1)
        for series in kept:
            path = series.files[0].relative_to(self._source) if self._source.is_dir() else Path(series.files[0].name)
            lone = len(series.files) == 1
            place = path.as_posix() if lone else path.parent.as_posix()
            if series.channels != channels[0][0]:
                skipped.add(series.files[0], "colour among grey series, or the reverse")
            elif not lone and folders[series.files[0].parent] > 1:
                skipped.add(
                    series.files[0], "several series in one folder; give each its own, or modality= and min_slices="
                )
            else:
                chosen[place] = series
        return chosen

    def _labels(self, table: ImageTable, places: list[str]) -> Labelled:
        params = self._params
        if params.label_columns:
            return from_columns(table, places, params.label_columns, params.task, params.classes)
        return from_column(
            table, places, params.label_column, params.task, params.classes, params.label_sign, params.label_none
        )


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False
