"""What `fedmed data` makes of a site file: new splits, clients, a corrupted copy; and phantoms.

The file that comes out is published when it is complete; the one that went in is only read.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.importers.options import check_target
from data_prep.protocol import derive
from data_prep.resplit import client_files, deal_anew
from fedmed.config import DataConfig, StepConfig, nearest, params_from, parse_overrides
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.writer import refused
from fedmed.errors import UserError
from fedmed.registry import PARTITIONS, resolve

Say = Callable[[str], None]


def split_file(
    source: str,
    out: str,
    words: Sequence[str] = (),
    *,
    ratio: str | None = None,
    clients: int | None = None,
    by: str | None = None,
    seed: int = 0,
    separate: str | None = None,
    force: bool = False,
    say: Say,
    quiet: bool = False,
) -> int:
    """Deal the images of a site file anew and write `out`; give the exit code, 0.

    ratio: shares of train, validation and test, "70/10/20": every site gets new splits, by patient. Or by: name of a partition,
    with its arguments in `words` (KEY=VALUE): its sites become clients, `clients` in all. separate: folder that also gets one file
    per site or client. Raises UserError for wrong words and for files that cannot be dealt.
    """
    path, target = _source(source), Path(out).expanduser()
    check_target(target, path, force, "site file")
    if (ratio is None) == (by is None):
        raise UserError("expected either --ratio 70/10/20 (new splits) or --by PARTITION (clients), one of the two")
    if ratio is not None and (clients is not None or words):
        raise UserError("--ratio takes no --clients and no KEY=VALUE; deal into clients in a second step")
    _check_seed(seed)
    wanted = target.parent if separate is None else Path(separate).expanduser()
    with _beside(target) as folder, _beside(wanted / target.name) as apart:
        if ratio is not None:
            made = deal_anew(path, folder / target.name, ratio, seed)
        else:
            step = _partition(path, by or "", clients, parse_overrides(words))
            made = derive(DataConfig(path=str(path), partition=step), seed, folder)
        parts = [] if separate is None else [(part, wanted / part.name) for part in client_files(made, apart)]
        for _, place in parts:
            check_target(place, path, force, "site file")
        made.replace(target)
        for part, place in parts:
            part.replace(place)
    if not quiet:
        _report(target, say)
    say(f"wrote {target}")
    if parts:
        say(f"wrote {len(parts)} files of one site each to {wanted}")
    return 0


def corrupt_file(
    source: str,
    out: str,
    name: str,
    words: Sequence[str] = (),
    *,
    seed: int = 0,
    force: bool = False,
    say: Say,
    quiet: bool = False,
) -> int:
    """Corrupt a site file as `data.corruption` of a run with this seed would, write `out`, and give the exit code, 0.

    name: of a corruption, its arguments in `words` (KEY=VALUE). What was clean lies in `reference/` of each site. Raises UserError
    for wrong words and for a corruption that does not fit the file.
    """
    path, target = _source(source), Path(out).expanduser()
    check_target(target, path, force, "site file")
    _check_seed(seed)
    values = parse_overrides(words)
    params_from(resolve("corruption", name), values, name)  # says what is wrong by the name that was typed
    with _beside(target) as folder:
        derive(DataConfig(path=str(path), corruption=StepConfig(name, values)), seed, folder).replace(target)
    if not quiet:
        _report(target, say)
    say(f"wrote {target}")
    return 0


def phantom_file(
    kind: str, out: str, words: Sequence[str] = (), *, force: bool = False, say: Say, quiet: bool = False
) -> int:
    """Write a phantom, a site file of synthetic images, and give the exit code, 0. words: arguments of the phantom, KEY=VALUE."""
    target, values = Path(out).expanduser(), parse_overrides(words)
    check_target(target, target.parent, force, "site file")
    known = inspect.signature(make_phantom).parameters
    defaults = {key: item.default for key, item in known.items() if key not in ("path", "kind")}
    for key, value in values.items():
        if key not in defaults:
            raise UserError(f"unknown key {key!r}{nearest(key, defaults)}")
        _check_number(key, defaults[key], value)
    with _beside(target) as folder:
        make_phantom(folder / target.name, kind, **values).replace(target)
    if not quiet:
        _report(target, say)
    say(f"wrote {target}")
    return 0


def _source(name: str) -> Path:
    """The input, opened once so that a file that is none is refused before anything is made."""
    path = Path(name).expanduser()
    SiteFile.open(path).close()
    return path


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"--seed: expected a whole number from 0, got {seed}")


def _check_number(key: str, default: Any, value: Any) -> None:
    """Refuse what is no number where one belongs; ranges, and lists of the right length, are for `make_phantom` to check."""
    numbers = value if isinstance(value, list) and key == "images_per_site" else [value]
    kinds = (int,) if default is None or isinstance(default, int) else (int, float)
    optional = default is None and value is None
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key}: expected true or false, got {value!r}")
    elif not optional and any(isinstance(one, bool) or not isinstance(one, kinds) for one in numbers):
        raise UserError(f"{key}: expected {'a whole number' if kinds == (int,) else 'a number'}, got {value!r}")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder on the file system of `target`, gone at the end, so that its files can take their places in one step."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        if not error.strerror:  # of HDF5, in many words
            raise refused(target, error) from error
        raise UserError(f"cannot write {target}: {error.strerror}") from error


def _partition(path: Path, name: str, clients: int | None, values: dict[str, Any]) -> StepConfig:
    """The partition `name` with `clients` in all: a number of pooled clients, or so many of each site as its share of training images."""
    if name not in PARTITIONS:
        raise UserError(f"--by: no partition is called {name!r}{nearest(name, PARTITIONS)}")
    cls = resolve("partition", name)
    key = next(field.name for field in fields(cls) if field.name in ("num_clients", "clients_per_site"))
    if clients is not None:
        if key in values:
            raise UserError(f"--clients {clients} and {key}={values[key]} say the same thing; leave one out")
        values = {**values, key: clients if key == "num_clients" else _per_site(path, clients)}
    params_from(cls, values, name)
    return StepConfig(name, values)


def _per_site(path: Path, clients: int) -> list[int]:
    """Clients of each site: one at least, the others where most training images per client are."""
    with SiteFile.open(path) as file:
        sizes = np.array([max(site.n_train, 1) for site in file.sites])
    if clients < len(sizes):
        raise UserError(
            f"--clients: this partition keeps the {len(sizes)} sites apart, expected at least {len(sizes)}, got {clients}"
        )
    counts = np.ones(len(sizes), dtype=np.int64)
    for _ in range(clients - len(sizes)):
        counts[int(np.argmax(sizes / counts))] += 1
    return counts.tolist()


def _report(path: Path, say: Say) -> None:
    """One line per site: images of each split, and how much of the annotation is changed where the file says so."""
    from data_prep.checks.show import aligned

    with SiteFile.open(path) as file:
        recipe: Mapping[str, Any] = file.recipe or {}
        noise = {site["site"]: site.get("noise_rate") for site in recipe.get("sites", [])}
        rows = [[s.name, str(s.n), str(s.n_train), str(s.n_val), str(s.n_test)] for s in file.sites]
    header = ["site", "images", "train", "val", "test"]
    if any(rate is not None for rate in noise.values()):
        header.append("noise rate")
        rows = [[*row, f"{noise.get(row[0]) or 0:.3f}"] for row in rows]
    for line in aligned(header, rows):
        say(line)
