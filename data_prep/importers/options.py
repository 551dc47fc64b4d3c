"""What is asked of an import, read from words: arguments of the importer, size, and how they are put down in the file."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.importers.base import Entry, Header, Importer
from data_prep.importers.folders import spread
from fedmed.config import params_from, parse_overrides
from fedmed.data.formats.limits import BadFile
from fedmed.errors import UserError
from fedmed.registry import resolve
from fedmed.version import __version__

SMALLEST, LARGEST = 8, 8192  # pixels along an edge that --size takes
LONGEST_NAME = 200  # characters of the name of a class or site
_LOOKED_AT = 200  # headers, to find the most frequent size


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) from "128" or "128x160". Raises UserError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise UserError(f"--size: expected HEIGHT or HEIGHTxWIDTH, each {SMALLEST}..{LARGEST} pixels, got {text!r}")
    return size


def make_importer(
    format: str, source: Path, words: Sequence[str], size: tuple[int, int] | None
) -> tuple[Importer, Any]:
    """The importer of a format with its arguments, and these. Raises UserError with the nearest name for a wrong one."""
    cls = resolve("importer", format)
    if not dataclasses.is_dataclass(getattr(cls, "Params", None)):
        raise UserError(f"{format} is no importer; expected a class with Params, as data_prep/importers/base.py says")
    if not source.exists():
        raise UserError(f"no file or folder at {source}; expected the source of the import")
    params = read_words(cls.Params, words, format)
    return cls(source, params, size), params


def read_words(cls: type[Any], words: Sequence[str], where: str) -> Any:
    """A `Params` from KEY=VALUE words. Values are read as YAML, except that text is taken as it stands (patterns hold signs YAML reads), and
    that a list may be written a,b,c.
    """
    hints = typing.get_type_hints(cls)
    plain: dict[str, Any] = {}
    others = []
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            others.append(word)  # refused below, in the words of every other command
            continue
        kinds = (
            set(typing.get_args(hints.get(key))) if isinstance(hints.get(key), types.UnionType) else {hints.get(key)}
        )
        lists = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) in (tuple, list)]
        if str in kinds:
            plain[key] = None if value == "null" and type(None) in kinds else value
        elif str in lists and not value.lstrip().startswith(("[", "null")):
            plain[key] = [part.strip() for part in value.split(",")] if value else []
        elif lists and not value.lstrip().startswith(("[", "null")):
            others.append(f"{key}=[{value}]")
        else:
            others.append(word)
    return params_from(cls, {**parse_overrides(others), **plain}, where)


def check_names(what: str, names: Iterable[str]) -> None:
    """Raise UserError where a name would not stand in one line of a table. It is not quoted: it may be a cell of a table, or a folder's name."""
    for name in names:
        kinds = {unicodedata.category(sign) for sign in name}
        wrong = "is empty" if not name.strip() else f"has {len(name)} characters" if len(name) > LONGEST_NAME else ""
        if any(kind[0] == "C" or kind in ("Zl", "Zp") for kind in kinds):
            wrong = "has line ends or control characters"
        if wrong:
            raise UserError(
                f"the name of a {what} {wrong}; expected 1 to {LONGEST_NAME} printable characters in one line. Rename it in the source, "
                f"or look whether the right column or folder gives the {what}"
            )


def common_size(importer: Importer, entries: Sequence[Entry]) -> tuple[int, int] | None:
    """The most frequent size in a look at up to 200 headers, the larger one of two as frequent; None when the importer cannot look."""
    look = getattr(importer, "look", None)
    if look is None:
        return None
    sizes: Counter[tuple[int, int]] = Counter()
    for entry in spread(entries, _LOOKED_AT):
        try:
            size = look(entry)
        except (BadFile, OSError):
            continue
        if size is not None:
            sizes[size] += 1
    return max(sizes, key=lambda size: (sizes[size], size[0] * size[1])) if sizes else None


def root_attributes(
    format: str, params: Any, header: Header, size: tuple[int, int], resized: bool, split: str, seed: int
) -> dict[str, Any]:
    """Attributes of the file: what the header says, image_size, and how it was made. No paths, no time stamps."""
    attrs = {key: value for key, value in header.attrs.items() if key not in ("natural_site", "name")}
    steps = attrs.pop("preprocessing", None)
    made = {
        "format": format,
        "arguments": _public(params),
        "size": list(size) if resized else None,
        "split": split,
        "seed": seed,
        "version": __version__,
        **({"steps": steps} if steps else {}),
    }
    return {
        "task": header.task,
        "classes": list(header.classes),
        "channels": list(header.channels),
        "image_size": list(size),
        **attrs,
        "preprocessing": json.dumps(made, sort_keys=True),
    }


def _public(params: Any) -> dict[str, Any]:
    """Arguments that say how pixels were treated: without those a class names in PRIVATE (where things lie in the source) and without paths."""
    private = getattr(params, "PRIVATE", ())
    return {
        key: value
        for key, value in dataclasses.asdict(params).items()
        if key not in private
        and not (isinstance(value, str) and re.search(r"[/\\]", value))
        and not isinstance(value, Path)
    }


def check_target(out: Path, source: Path, force: bool, what: str) -> None:
    """Raise UserError when a file to be written exists (unless `force`), is a folder, or is the source itself."""
    if out.is_dir() or (out.exists() and out.samefile(source)):
        raise UserError(f"{what} {out}: expected the name of a file to be written")
    if out.exists() and not force:
        raise UserError(f"{what} {out} exists already; --force replaces it")
