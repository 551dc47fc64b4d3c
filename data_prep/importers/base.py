"""What an importer gives: entries to read, the rows each of them holds, and what is true of all of them.

An importer knows a format or the folders of one public data set. Reading in parallel, hashing names, dealing splits and writing the
site file are not its business (`run`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np


@dataclass(frozen=True)
class Entry:
    """Something to be read: an image with its annotation, or a volume.

    site: natural site it belongs to, "" where there is only one; item, group: names in the source (file, lesion, patient), which never reach
    the site file as they are: a keyed hash does. The same group name means the same patient, at whatever site, and goes to one split as a
    whole; where names hold within a site only, put the site into them. files: what is read, the image first; split: "train", "val" or "test"
    where the source says, else ""; values: what is known of it before reading (label, view, ...); rows: how many images it is expected to
    give.
    """

    site: str
    item: str
    group: str
    files: tuple[Path, ...]
    split: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 1


@dataclass(frozen=True)
class Row:
    """One image of the site file: arrays `image` (H, W) or (H, W, C) and annotations (H, W); values: numbers or short vectors (`label`, ...).

    The names, shapes and types of arrays and values are the same in all rows of a site. place: tells the images of one entry apart (number
    of the slice); None where there is one.
    """

    arrays: Mapping[str, np.ndarray]
    values: Mapping[str, Any] = field(default_factory=dict)
    place: int | None = None


@dataclass(frozen=True)
class Header:
    """What is true of all images: task, names of classes (segmentation: background first) and channels, further attributes of the file.

    attrs: `name` (of the data set), modality, source, licence, citation, ignore_value_in_<annotation>, natural_site (false: sites made up),
    preprocessing (what the importer itself does), ...; no dates, names or paths. remarks: what the user should know, without names.
    """

    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass
class Skipped:
    """Files that were left out and why. Reasons hold no names; which file it was stands in `files` and goes to the private trace only."""

    reasons: Counter[str] = field(default_factory=Counter)
    files: list[tuple[str, str]] = field(default_factory=list)

    def add(self, file: str | Path, reason: str) -> None:
        """Count one file."""
        self.reasons[reason] += 1
        self.files.append((str(file), reason))

    def __len__(self) -> int:
        return len(self.files)


class Importer(Protocol):
    """A source of images: cheap to make, `scan` looks at the folder, `read` gives pixels.

    A class may also have `look(entry) -> (H, W) | None`, the size of an entry's image from its header alone. Without a size asked for, the
    most frequent one then rules; without `look`, that of the first image does. Images of another size are skipped by `run`.
    """

    Params: ClassVar[type[Any]]

    def __init__(self, source: Path, params: Any, size: tuple[int, int] | None) -> None:
        """source: the folder or file; params: a `Params`; size: (H, W) that every row shall have, None: as stored (or the importer's own)."""
        ...

    def scan(self, skipped: Skipped) -> tuple[Header, Sequence[Entry]]:
        """Find the entries, sorted by site, group and item, reading headers and tables only. Raises UserError when the folder is not of this
        kind.
        """
        ...

    def read(self, entry: Entry) -> Sequence[Row]:
        """Read one entry, in any thread, at the size asked for. Raises `BadFile` when it cannot be used."""
        ...
