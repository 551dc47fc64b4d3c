"""What is to be predicted: pictures, volumes, DICOM series and site files among the files and folders somebody names."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedmed.data.formats.dicom import Series, find_series
from fedmed.data.formats.nifti import NIFTI_SUFFIXES
from fedmed.data.formats.pictures import PICTURE_SUFFIXES
from fedmed.errors import UserError

PICTURE, VOLUME, SERIES, SITE_FILE = "picture", "volume", "series", "site file"
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}
_HEAD = 132  # bytes: DICOM has its mark behind 128
Contrasts = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Source:
    """One thing to predict.

    kind: of the four above; name: of its outputs, relative and without ending; shown: of its input, relative to the folder that was named;
    files: its files (contrasts of a case in the order of the channels, None: missing); series: of kind SERIES.
    """

    kind: str
    name: str
    shown: str
    files: tuple[Path | None, ...]
    series: Series | None = None

    @property
    def ending(self) -> str:
        """Ending of the first file in lower case, `.nii.gz` as one."""
        name = next(path for path in self.files if path is not None).name.lower()
        return ".nii.gz" if name.endswith(".nii.gz") else PurePosixPath(name).suffix


def find_sources(
    inputs: Sequence[str | Path],
    skipped: Counter[str],
    contrasts: Contrasts = (),
    takes_missing: bool = False,
    leave_out: Path | None = None,
) -> list[Source]:
    """All sources among files and folders, sorted within each input. Reads the first bytes of files, and headers of DICOM.

    skipped: takes the reasons of files that are not used; contrasts: endings of names (alternatives per channel) that make a case of several
    volumes; takes_missing: a case may lack some; leave_out: a folder that is not entered. Raises UserError for an input that is not there.
    """
    roots = [Path(one).expanduser() for one in inputs]
    found: list[Source] = []
    for one, root in zip(inputs, roots, strict=True):
        if not str(one):
            raise UserError("the name of an input is empty; expected images to predict ('.' for this folder)")
        if not root.exists():
            raise UserError(f"no file or folder at {root}; expected images to predict")
        prefix = f"{root.resolve().name}/" if len(roots) > 1 and root.is_dir() else ""
        paths = _walk(root, real_path(leave_out) if leave_out else None) if root.is_dir() else [root]
        folder = root if root.is_dir() else root.parent
        kinds = {path: _kind(path) for path in paths}
        volumes = [path for path in paths if kinds[path] == VOLUME]
        for path in paths:
            kind = kinds[path]
            if kind in (PICTURE, SITE_FILE):
                shown = path.relative_to(folder).as_posix()
                found.append(Source(kind, prefix + _stem(shown), prefix + shown, (path,)))
            elif not kind:
                skipped["of a file type that is not read here"] += 1
        found += _cases(volumes, folder, prefix, contrasts, takes_missing, skipped)
        if SERIES in kinds.values():
            found += _series(root, prefix, skipped, {path for path in paths if kinds[path] == SERIES})
    return _distinct(found)


def real_path(path: Path) -> Path:
    """A path without links; unlike `Path.resolve` it takes a link that leads round in circles for a file that is not there."""
    return Path(os.path.realpath(path))


def _kind(path: Path) -> str:
    """Kind of a file by its first bytes or its ending, "" for none of them."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        head = b""
    name = path.name.lower()
    if head[128:] == b"DICM":
        return SERIES
    if head.startswith(b"\x89HDF\r\n"):
        return SITE_FILE
    if name.endswith(NIFTI_SUFFIXES):
        return VOLUME
    return PICTURE if name.endswith(PICTURE_SUFFIXES) else ""


def _walk(root: Path, leave_out: Path | None) -> list[Path]:
    """Regular files below a folder, sorted; hidden ones, and links to folders, are left out."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if _visible(name) and (leave_out is None or real_path(Path(parent, name)) != leave_out)
        ]
        found += [path for name in names if _visible(name) and (path := Path(parent, name)).is_file()]
    return sorted(found)


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _JUNK


def _stem(name: str) -> str:
    """A relative path without the ending of its name."""
    base = name[:-3] if name.lower().endswith(".nii.gz") else name
    return str(PurePosixPath(base).with_suffix("")) if PurePosixPath(base).suffix else base


def _cases(
    volumes: Sequence[Path], folder: Path, prefix: str, contrasts: Contrasts, takes_missing: bool, skipped: Counter[str]
) -> list[Source]:
    """One source per volume, or per case where contrasts are told apart by endings of names."""
    shown = {path: path.relative_to(folder).as_posix() for path in volumes}
    if not contrasts:
        return [Source(VOLUME, prefix + _stem(name), prefix + name, (path,)) for path, name in shown.items()]
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for path, name in shown.items():
        stem = _stem(name)
        fits = [(len(end), place, end) for place, ends in enumerate(contrasts) for end in ends if stem.endswith(end)]
        if not fits:
            skipped[
                f"a volume whose name ends with none of the contrasts {', '.join(ends[0] for ends in contrasts)}"
            ] += 1
            continue
        _, place, end = max(fits)
        key = stem.removesuffix(end)
        if place in cases[key]:
            skipped["a second volume of the same contrast"] += 1
        else:
            cases[key][place] = path
    found = []
    for key, parts in cases.items():
        if len(parts) < len(contrasts) and not takes_missing:
            skipped["a case without all contrasts"] += 1
            continue
        first = parts[min(parts)]
        name = prefix + (key if key and not key.endswith("/") else _stem(shown[first]))
        found.append(Source(VOLUME, name, prefix + shown[first], tuple(parts.get(i) for i in range(len(contrasts)))))
    return found


def _series(root: Path, prefix: str, skipped: Counter[str], marked: set[Path]) -> list[Source]:
    """DICOM series of a folder, or of one file, named after their folder where they are alone in it, else after their first file."""

    def on_bad(path: Path, reason: str) -> None:
        if path in marked:
            skipped[reason] += 1

    series = [one for one in find_series(root, on_bad=on_bad) if set(one.files) & marked]
    folders = Counter(parent for one in series for parent in {path.parent for path in one.files})
    found = []
    for one in series:
        first = one.files[0]
        folder = root if root.is_dir() else root.parent
        alone = root.is_dir() and folders[first.parent] == 1 and len({path.parent for path in one.files}) == 1
        shown = (first.parent if alone else first).relative_to(folder).as_posix()
        shown = root.resolve().name if shown == "." else shown
        name = shown if alone else _stem(shown)
        found.append(Source(SERIES, prefix + name, prefix + shown, one.files, one))
    return found


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """The sources with names of which no two are equal on a disk that ignores case: the ending is added, then a number."""
    taken = Counter(source.name.casefold() for source in sources)
    used: set[str] = set()
    found = []
    for source in sources:
        name = source.name
        if taken[name.casefold()] > 1:
            name = f"{name}_{source.ending.strip('.').replace('.', '_')}" if source.ending else name
        plain, number = name, 2
        while name.casefold() in used or (name != source.name and name.casefold() in taken):
            name, number = f"{plain}_{number}", number + 1
        used.add(name.casefold())
        # names that are no UTF-8 can then stand in the table, too
        shown = source.shown.encode("utf-8", "backslashreplace").decode()
        found.append(Source(source.kind, name, shown, source.files, source.series))
    return found
