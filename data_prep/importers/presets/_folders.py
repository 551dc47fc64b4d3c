"""Folders of public data sets: which of them was meant, and the pictures in it. No name of a file or folder inside reaches an error text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from data_prep.importers.base import Skipped
from fedmed.errors import UserError

MAX_FOLDERS = 5000  # looked at on a level; a wrong path such as a home folder answers soon
_TWICE = "image found twice; the first by path is taken"


def find_root(source: Path, is_root: Callable[[Path], bool], preset: str, wanted: str) -> Path:
    """Folder that `is_root` accepts: `source`, else the one such folder a level below, else two levels below.

    wanted: what such a folder holds, for the error. Raises UserError when there is none, or several on one level.
    """
    if not source.is_dir():
        raise UserError(
            f"{preset}: expected a folder with {wanted}, found {'a file' if source.exists() else 'nothing'} at {source}"
        )
    level = [source]
    for _ in range(3):
        found = [folder for folder in level if is_root(folder)]
        if len(found) > 1:
            raise UserError(f"{preset}: {len(found)} folders in {source} hold {wanted}. Give one of them.")
        if found:
            return found[0]
        level = list(islice((child for folder in level for child in subfolders(folder)), MAX_FOLDERS))
    raise UserError(
        f"{preset}: expected {wanted} in {source} or up to two levels below, found {tally(source)}. Give the folder that holds them."
    )


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder by name, hidden ones left out; none where it cannot be listed."""
    try:
        return sorted(child for child in folder.iterdir() if _is_visible(child.name) and child.is_dir())
    except OSError:
        return []


def files(folder: Path) -> list[Path]:
    """Files in a folder by name, hidden ones left out."""
    try:
        return sorted(child for child in folder.iterdir() if _is_visible(child.name) and child.is_file())
    except OSError:
        return []


def tally(folder: Path) -> str:
    """What lies in a folder, in numbers: "2 folders, 3 files (.csv 1, .png 2)"."""
    endings = Counter(path.suffix.lower() if len(path.suffix) <= 8 else "" for path in files(folder))
    kinds = ", ".join(f"{ending or 'no ending'} {count}" for ending, count in sorted(endings.items())[:8])
    return f"{_counted(len(subfolders(folder)), 'folder')}, {_counted(endings.total(), 'file')}{f' ({kinds})' if kinds else ''}"


def pictures(folders: Iterable[Path], suffixes: Iterable[str], skipped: Skipped, ending: str = "") -> dict[str, Path]:
    """Pictures in folders and all folders below, by file name without suffix and without `ending`, which the names must have.

    suffixes: in lower case, with the dot. The same name again is counted in `skipped` and left out; hidden files are no pictures.
    """
    kept, found = frozenset(suffixes), {}
    for path in (path for folder in folders for path in _walk(folder)):
        if path.suffix.lower() not in kept or not path.stem.endswith(ending):
            continue
        name = path.stem.removesuffix(ending)
        if name in found:
            skipped.add(path, _TWICE)
        else:
            found[name] = path
    return found


def _walk(folder: Path) -> Iterable[Path]:
    for parent, below, names in os.walk(folder):
        below[:] = sorted(filter(_is_visible, below))
        yield from (Path(parent, name) for name in sorted(filter(_is_visible, names)))


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))
