"""Files of a source: listing them, finding those a folder name or pattern stands for, and what their folders say of split and site.

Paths are relative to the source, with forward slashes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from data_prep.importers.base import Skipped
from fedmed.errors import UserError

Key = tuple[str, ...]  # what an image and its mask have in common
T = TypeVar("T")
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test",
}  # fmt: skip
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}


def list_files(source: Path) -> list[str]:
    """All regular files below a folder, sorted; hidden ones, and those systems leave behind, are left out. Links to folders are not followed."""
    if not source.is_dir():
        raise UserError(f"{source} is no folder; expected a folder of files")
    found: list[str] = []
    folders = [("", str(source))]
    while folders:
        below, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.casefold() in _JUNK:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((f"{below}{entry.name}/", entry.path))
                    elif _leads_to_file(entry):
                        found.append(f"{below}{entry.name}")
        except OSError as error:
            where = f"the folder {source}" if not below else f"a folder below {source}"
            raise UserError(f"cannot read {where}: {error.strerror}") from error
    return sorted(found)


def _leads_to_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; a link that leads round in circles is none, and no reason to stop."""
    try:
        return entry.is_file()
    except OSError:
        return False


def stem(name: str) -> str:
    """The name of a file without its folders and its ending; `.nii.gz` is one ending."""
    base = name.rpartition("/")[2]
    base = base[:-3] if base.casefold().endswith(".nii.gz") else base
    return base.rpartition(".")[0] or base


def matcher(spec: str, suffix: str = "") -> Callable[[str], Key | None]:
    """A function that gives the key of a path that `spec` stands for, None for other paths.

    spec: a folder's name, at any level ("images"), "." for all, or a pattern from the source ("*/photo/*.png", `**/` for any folders). The
    key is what the wildcards stand for, or the folders above and below the named one; then the name without its ending and without `suffix`,
    which it must end with.
    """
    text = spec.strip("/") or "."
    if text == ".":
        pattern = re.compile(r"((?:.*/)?)([^/]*)")
    elif any(sign in text for sign in "*?"):
        pattern = re.compile(_regex(text))
    else:
        pattern = re.compile(rf"((?:.*?/)?){re.escape(text)}/((?:.*/)?)([^/]*)")

    def key(path: str) -> Key | None:
        found = pattern.fullmatch(path)
        if found is None or not stem(path).endswith(suffix):
            return None
        *above, last = [part for group in found.groups() for part in group.split("/") if part] or [""]
        name = stem(last) if last and path.endswith(last) else last
        return (*above, name.removesuffix(suffix))

    return key


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    signs = {"**/": r"((?:.*/)?)", "*": r"([^/]*)", "?": r"([^/])"}
    return "".join(signs.get(part, re.escape(part)) for part in parts)


def by_key(
    source: Path,
    paths: Iterable[str],
    key: Callable[[str], Key | None],
    endings: Sequence[str],
    skipped: Skipped,
    what: str,
) -> dict[Key, str]:
    """Paths that have a key, by key. Files with none of the endings, and the second of two with the same key, are counted as skipped."""
    found: dict[Key, str] = {}
    for path in paths:
        name = key(path)
        if name is None:
            continue
        if not path.casefold().endswith(tuple(endings)):
            skipped.add(source / path, f"{what} of a file type that is not read here")
        elif name in found:
            skipped.add(source / path, f"{what} of the same name as another")
        else:
            found[name] = path
    return found


def split_of(path: str) -> str:
    """Split that a folder on the way to the file is named for, "" where none is."""
    for folder in path.split("/")[:-1]:
        if folder.casefold() in SPLIT_FOLDERS:
            return SPLIT_FOLDERS[folder.casefold()]
    return ""


def level_of(path: str, level: int) -> str:
    """Name of the folder at a level below the source (1: the first); "" where the file lies higher."""
    folders = path.split("/")[:-1]
    return readable(folders[level - 1]) if level <= len(folders) else ""


def readable(name: str) -> str:
    """A name of the file system as text that can be stored; bytes that are no UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode()


def spread(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, evenly spaced, the first among them."""
    step = max(1, -(-len(values) // count))
    return list(values[::step])


def check_pattern(name: str, pattern: str) -> None:
    """Raise ValueError unless a pattern (regular expression) has one (...)."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{name}: no valid pattern ({error})") from error
    if groups != 1:
        raise ValueError(f"{name}: expected a pattern with one (...), got {groups}")


def part_of(path: str, pattern: str) -> str:
    """What the (...) of a pattern stands for in a path, "" where it is not found."""
    found = re.search(pattern, path)
    return (found[1] or "") if found else ""
