"""From a configuration to the site file a run reads: paths made absolute, phantom and data protocol applied once."""

from __future__ import annotations

import dataclasses
import os
from functools import lru_cache
from pathlib import Path

from fedmed.config import Config, to_yaml
from fedmed.data.site_file import SiteFile
from fedmed.errors import UserError
from fedmed.registry import DERIVE, import_attribute


def cache_folder(config: Config) -> Path:
    """Where derived site files go: `data.cache_dir`, else the user's cache folder. Made with mode 0700: it holds images."""
    chosen = config.data.cache_dir
    folder = (
        Path(chosen).expanduser()
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fedmed"
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.resolve()


def absolute(path: str) -> str:
    """A path as it is meant here, absolute."""
    return str(Path(path).expanduser().resolve())


def with_absolute_paths(config: Config) -> Config:
    """The config with every path absolute, so that it means the same in a process with another working directory."""

    path = config.data.path
    if path and not path.startswith("phantom:"):
        path = absolute(path)
    central = config.evaluation.central
    if central not in ("auto", "none"):
        central = absolute(central)
    alone = config.evaluation.local_only
    return dataclasses.replace(
        config,
        out=absolute(config.out) if config.out else "",
        data=dataclasses.replace(config.data, path=path, cache_dir=str(cache_folder(config))),
        evaluation=dataclasses.replace(
            config.evaluation, central=central, local_only=absolute(alone) if alone else None
        ),
    )


def site_file(config: Config) -> Path:
    """The site file of a simulation, after its data protocol; made once per recipe. Raises `UserError`."""
    if not config.data.path:
        raise UserError(
            "data.path is empty: expected a site file (HDF5) or phantom:<kind>; for example data.path=phantom:classification"
        )
    source = Path(config.data.path)
    stamp = (source.stat().st_mtime_ns, source.stat().st_size) if source.is_file() else None
    return _derived(to_yaml(dataclasses.replace(config, out="")), stamp)


@lru_cache(maxsize=4)
def _derived(text: str, stamp: tuple[int, int] | None) -> Path:
    """The answer for one configuration; `stamp` makes a source that was rewritten meanwhile another question."""
    from fedmed.config import from_yaml

    config = from_yaml(text)
    derived: Path = import_attribute(DERIVE)(config.data, config.seed, cache_folder(config))
    return derived


def count_sites(path: Path) -> int:
    """Number of sites in a site file. A site of an original file that has nothing to train on is a `UserError`."""
    with SiteFile.open(path) as file:
        empty = [s.name for s in file.sites if s.n_train == 0]
        if empty and (file.recipe is None or len(empty) == len(file.sites)):
            raise UserError(
                f"{path}: the train split of {', '.join(empty[:3])} is empty; every site needs training items, or leave the site out of the file"
            )
        return len(file.sites)
