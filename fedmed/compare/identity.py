"""When two configurations are of one run: a hash of what its results depend on, and the first key in which two differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmed.config import Config, to_tree

HASH_DIGITS = 16
_SAMPLE = 1024 * 1024  # bytes read at one place of a data file
_MAX_SAMPLES = 1024  # places; a smaller file is read whole
_SITES_OWN = (
    "path",
    "phantom",
    "resize",
    "partition",
    "corruption",
    "cache_dir",
)  # of data: without effect over real sites


def result_tree(config: Config) -> dict[str, Any]:
    """The part of a configuration that results depend on, as nested plain dicts.

    Left out: name, description, out, tracking; of `engine` all but the precision (and that sites are real ones); of `data` the
    cache, and the phantom's arguments where a file is named; deadlines and checkpoints of `federation`. Of files only the name
    counts, so that a folder may be moved. Over real sites what `data` says of files is left out too.
    """
    tree = to_tree(config)
    for key in ("name", "description", "out", "tracking"):
        tree.pop(key)
    real = config.engine.name == "deployment"
    tree["engine"] = {"precision": config.engine.precision, "real_sites": real}
    data, evaluation, federation = tree["data"], tree["evaluation"], tree["federation"]
    data.pop("cache_dir")
    for key in list(federation):
        if key.endswith("_deadline_s") or key == "checkpoint_every":
            federation.pop(key)
    if real:
        for key in _SITES_OWN:
            data.pop(key, None)
        evaluation["central"] = "none" if evaluation["central"] == "auto" else evaluation["central"]
    elif data["path"] and not data["path"].startswith("phantom:"):
        data["path"] = Path(data["path"]).name
        data.pop("phantom")  # the generator has no part in it
    for key in ("central", "local_only"):
        evaluation[key] = None if evaluation[key] is None else Path(evaluation[key]).name
    return tree


def config_hash(config: Config) -> str:
    """The first 16 hex digits of the SHA-256 of `result_tree` as JSON with sorted keys."""
    text = json.dumps(result_tree(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def first_difference(old: Config, new: Config) -> str:
    """Say in which key two configurations differ first, with both values; "" where results depend on none of them."""
    before, after = dict(_leaves(result_tree(old))), dict(_leaves(result_tree(new)))
    missing = object()
    for key in dict.fromkeys([*after, *before]):
        a, b = before.get(key, missing), after.get(key, missing)
        if a != b:
            return f"{key} is {_said(a, missing)} there and {_said(b, missing)} now"
    return ""


def _said(value: Any, missing: object) -> str:
    return "not set" if value is missing else json.dumps(value)


def _leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        place = f"{where}.{key}" if where else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, place)
        else:
            yield place, value


def data_mark(path: str) -> str | None:
    """The first 16 hex digits of a SHA-256 over a data file, None for phantom data and what is no file.

    Size and content; of a file above 1 GiB a thousand places of 1 MiB, evenly spread. Read again only when the file has changed.
    """
    file = Path(path).expanduser()
    if not path or path.startswith("phantom:") or not file.is_file():
        return None
    state = file.stat()
    return _mark(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _mark(file: Path, changed: int, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in range(0, size, max(_SAMPLE, size // _MAX_SAMPLES)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:HASH_DIGITS]
