"""Rows filed into a site file in the order they come: ids hashed, odd ones left out, splits dealt when a site is complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_prep.importers.base import Entry, Header, Row, Skipped
from data_prep.importers.ids import Ids
from data_prep.importers.reading import OTHER_SIZE
from data_prep.importers.splits import deal
from fedmed.data.site_checks import ANNOTATIONS, SPLITS
from fedmed.data.site_writer import SiteRows, SiteWriter
from fedmed.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What is the same for all sites of a file.

    attributes: root attributes for a size; size: (H, W) of all images, None: that of the first; site: name of the only site; named: several
    sites, each in a group of its own; fixed: split of the groups the source settles.
    """

    out: Path
    header: Header
    attributes: Mapping[str, Any]
    size: tuple[int, int] | None
    site: str
    named: bool
    fixed: Mapping[str, int]
    shares: tuple[float, float, float]
    seed: int
    compression: int


@dataclass
class _Open:
    """The site that is being written: its rows, the group and label of each, and the layout they share."""

    name: str
    rows: SiteRows
    layout: dict[str, Any]
    groups: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)


class Filing:
    """Writes the site file; a context manager. Left with an exception, nothing of the file stays."""

    def __init__(
        self, plan: Plan, ids: Ids, skipped: Skipped, trace: list[dict[str, Any]] | None, entries: Sequence[Entry]
    ) -> None:
        """trace: takes one record per image and per file left out, None: none is kept; entries: all that may come."""
        self._plan, self._ids, self._skipped, self._trace = plan, ids, skipped, trace
        self._writer: SiteWriter | None = None
        self._site: _Open | None = None
        self._image: tuple[tuple[int, ...], np.dtype] | None = None
        self._settled = dict(plan.fixed)
        self.facts: list[dict[str, Any]] = []
        self.single: list[str] = []  # sites that have one group only
        self._capacity: Counter[str] = Counter()
        if all(
            entry.rows == 1 for entry in entries
        ):  # of volumes fewer slices may come, and room kept for others stays in the file
            self._capacity.update(entry.site for entry in entries)

    def __enter__(self) -> Filing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    def add(self, entry: Entry, found: list[Row] | str) -> int:
        """File the rows of an entry, or count why it is left out; the number of images filed. Entries come site by site."""
        reason = found if isinstance(found, str) else self._misfit(entry, found)
        if reason:
            self.skip(entry, reason)
            return 0
        assert not isinstance(found, str)
        site = self._open(entry, found[0])
        for row in found:
            item, group = self._ids.item(entry.item, row.place), self._ids.group(entry.group)
            number = site.rows.append(row.arrays, item, group, row.values)
            site.groups.append(entry.group)
            if self._plan.header.task != "segmentation":
                site.labels.append(row.values["label"])
            self._record(entry, row.place, "imported", "", number)
        return len(found)

    def skip(self, entry: Entry, reason: str) -> None:
        """Count an entry that is left out."""
        self._skipped.add(entry.files[0] if entry.files else "", reason)
        self._record(entry, None, "skipped", reason, None)

    def finish(self) -> None:
        """Deal the splits of the last site."""
        if self._site is None:
            return
        site, self._site = self._site, None
        plan = self._plan
        labels = np.array(site.labels) if site.labels else None
        chosen = deal(site.groups, labels, self._settled, plan.shares, plan.seed, site.name)
        self._settled.update(chosen)
        codes = np.array([chosen[group] for group in site.groups])
        splits = {name: np.flatnonzero(codes == code).tolist() for code, name in enumerate(SPLITS)}
        site.rows.finish(splits)
        num_groups = len(set(site.groups))
        if num_groups == 1 and not codes.any():
            self.single.append(site.name)
        sizes = {name: len(rows) for name, rows in splits.items()}
        self.facts.append({"site": site.name, "images": len(codes), "groups": num_groups, **sizes})

    def _open(self, entry: Entry, row: Row) -> _Open:
        """The open site of an entry; the one before is finished, the file made with the first image."""
        name = entry.site if self._plan.named else self._plan.site
        if self._site is not None and self._site.name == name:
            return self._site
        self.finish()
        if self._writer is None:
            height, width = row.arrays["image"].shape[:2]
            meta = {**self._plan.attributes, "image_size": [height, width]}
            self._writer = SiteWriter(
                self._plan.out, meta, self._plan.compression, root=not self._plan.named
            ).__enter__()
            self._image = row.arrays["image"].shape, row.arrays["image"].dtype
        natural = {"natural_site": bool(self._plan.header.attrs.get("natural_site", True))} if self._plan.named else {}
        rows = self._writer.site(name, self._capacity[entry.site], natural)
        self._site = _Open(name, rows, _layout(row))
        return self._site

    def _misfit(self, entry: Entry, found: list[Row]) -> str:
        """Why rows do not fit those before them; "" when they do."""
        name = entry.site if self._plan.named else self._plan.site
        known = self._site.layout if self._site is not None and self._site.name == name else None
        for row in found:
            image = row.arrays["image"]
            first = self._image or (image.shape, image.dtype)
            if image.shape[:2] != (self._plan.size or first[0][:2]):
                return OTHER_SIZE
            if image.shape != first[0] or image.dtype != first[1]:
                return f"pixels of type {image.dtype.name}, those before are {first[1].name}"
            layout = _layout(row)
            if self._image is None and not any(key in layout for key in ANNOTATIONS):
                raise UserError(
                    "the source gives no annotation; a site file needs masks, scribbles or labels for its images"
                )
            if self._plan.header.task != "segmentation" and "label" not in layout:
                return "no label"
            known = known or layout
            if layout != known:
                return "annotation or values unlike those of the images before"
        return ""

    def _record(self, entry: Entry, place: int | None, state: str, reason: str, row: int | None) -> None:
        if self._trace is not None:
            self._trace.append({
                "item_id": self._ids.item(entry.item, place),
                "group_id": self._ids.group(entry.group),
                "site": entry.site or self._plan.site,
                "file": str(entry.files[0]) if entry.files else "",
                "place": place,
                "row": row,
                "state": state,
                "reason": reason,
            })  # fmt: skip


def _layout(row: Row) -> dict[str, Any]:
    """Names, shapes and types of what a row holds, the image left out; comparing two is cheap."""
    kinds: dict[str, Any] = {name: (array.shape, array.dtype) for name, array in row.arrays.items() if name != "image"}
    for name, value in row.values.items():
        kinds[name] = np.shape(value)
    return kinds
