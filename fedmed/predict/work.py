"""What is done for one source, by its kind, and the table of labels.

Letters: n planes of a source, K classes with a probability.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.data.formats.limits import BadFile
from fedmed.files import write_csv
from fedmed.predict import outputs
from fedmed.predict.inputs import PICTURE, SITE_FILE, VOLUME, Source
from fedmed.predict.predictor import Predictor, Show
from fedmed.predict.sheet import Sheet
from fedmed.predict.site_files import label_kind, open_sites, write_masks_of_site_file

_LOSSY = (".jpg", ".jpeg", ".bmp")
_PLACES = ("file", "site", "row", "item_id", "slice")


@dataclass
class Work:
    """What goes on while sources are predicted.

    site, split: of site files; done: sources by kind and ending of their masks; images: planes by kind; lossy: pictures whose mask has
    another format; rows: of the table.
    """

    predictor: Predictor
    out: Path
    sheet: Sheet
    site: str | None
    split: str
    probabilities: bool
    with_patient: bool
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    lossy: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    table = "predictions.csv"

    @property
    def segments(self) -> bool:
        """True for masks, False for labels of whole images."""
        return self.predictor.model.task == "segmentation"

    @property
    def values(self) -> str:
        """What the values of masks stand for."""
        classes = self.predictor.classes
        ids = ", ".join(f"{number} {name}" for number, name in enumerate(classes))
        pictures = any(kind == PICTURE for kind, _ in self.done)
        return f"{ids}; 255 for 1 in pictures" if pictures and len(classes) == 2 else ids

    def write_table(self) -> None:
        """Write the table of labels, 0600, if there is one; columns of places that no row has are left out."""
        if not self.rows:
            return
        unused = [name for name in _PLACES if all(row[name] == "" for row in self.rows)]
        rows = [{key: value for key, value in row.items() if key not in unused} for row in self.rows]
        write_csv(self.out / self.table, rows).chmod(0o600)


def predict_source(work: Work, number: int, source: Source) -> None:
    """Predict source number `number` and write what was found. Raises `BadFile` where it cannot be used."""
    if source.kind == SITE_FILE:
        _site_file(work, number, source)
        return
    preparation, like = work.predictor.preparation, None
    if source.kind == PICTURE:
        assert source.files[0] is not None
        planes = preparation.picture(source.files[0])
    elif source.kind == VOLUME:
        planes, like = preparation.volume(source.files)
    else:
        planes = preparation.series(source.series)
    show = work.sheet.taker(number, Path(source.name).name)("", planes.count)
    ending = ""
    if work.segments:
        labels, prob = _masks(work, planes, show)
        classes = work.predictor.classes
        if source.kind == PICTURE:
            first = None if prob is None else prob[0]
            ending = outputs.write_masks_of_picture(work.out, source, labels[0], first, len(classes))
            work.lossy += source.ending in _LOSSY
        elif like is not None:
            ending = outputs.write_masks_of_volume(work.out, source, like, planes.axis, labels, prob)
        else:
            ending = outputs.write_masks_of_series(work.out, source, labels, prob, classes, work.with_patient)
    else:
        _scores(work, source, planes, show)
    work.done[source.kind, ending] += 1
    work.images[source.kind] += planes.count


def _masks(work: Work, planes: Any, show: Show | None) -> tuple[np.ndarray, np.ndarray | None]:
    """All label maps (n, H, W) uint8 of a source, and its foreground probabilities (n, F, H, W) where they are wanted."""
    count = len(work.predictor.classes) - 1
    labels = np.zeros((planes.count, *planes.shape), np.uint8)
    prob = np.zeros((planes.count, count, *planes.shape), np.float32) if work.probabilities else None
    for place, (found, shares) in enumerate(work.predictor.masks(planes, show)):
        labels[place] = found
        if prob is not None:
            prob[place] = shares
    return labels, prob


def _scores(work: Work, source: Source, planes: Any, show: Show | None) -> None:
    """Rows of the table for a source: one, or one per slice and their mean."""
    prob = work.predictor.scores(planes, show)
    if source.kind == PICTURE:
        work.rows.append(_row(work, prob[0], file=source.shown))
        return
    for place, one in enumerate(prob):
        work.rows.append(_row(work, one, file=source.shown, slice=place))
    work.rows.append(_row(work, prob.mean(axis=0), file=source.shown, slice="mean"))


def _row(work: Work, prob: np.ndarray, **places: Any) -> dict[str, Any]:
    """A row of the table: where, what, and the probability (K,) of each class."""
    classes = work.predictor.classes
    shares = {f"prob {name}": round(float(value), 6) for name, value in zip(classes, prob, strict=True)}
    return {**dict.fromkeys(_PLACES, ""), **places, "predicted": work.predictor.said(prob), **shares}


def _site_file(work: Work, number: int, source: Source) -> None:
    """Predict the rows of a split of the sites that are meant."""
    path, predictor = source.files[0], work.predictor
    assert path is not None
    taker = work.sheet.taker(number, Path(source.name).name)
    with open_sites(path, predictor, work.site, work.split) as sites:
        count = sum(len(site.rows) for site in sites)
        if not count:
            raise BadFile(f"a site file without images in split {work.split}")
        if work.site is not None:  # some models are told how their site annotates
            data = predictor.model.client.data
            data.label_kind = (
                label_kind(path, sites[0].group, predictor.model.config.data.annotation, data.task) or data.label_kind
            )
        if work.segments:
            target = outputs.place(work.out, source, "mask", ".h5")
            write_masks_of_site_file(target, sites, predictor, work.split, work.probabilities, taker)
        else:
            for site in sites:
                _labels_of_site(work, source, site, taker(site.site, len(site.rows)))
    work.done[SITE_FILE, ".h5"] += 1
    work.images[SITE_FILE] += count


def _labels_of_site(work: Work, source: Source, site: Any, show: Show | None) -> None:
    if not len(site.rows):
        return
    prob = work.predictor.scores(site.planes, show)
    for row, item_id, one in zip(site.rows.tolist(), site.item_id, prob, strict=True):
        work.rows.append(_row(work, one, file=source.shown, site=site.site, row=row, item_id=item_id))
