"""What a site knows of itself before anybody asks: which site of its data file it is, and which versions are installed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedmed.deployment.site_config import SiteConfig
from fedmed.engines import bundle
from fedmed.engines.flower_tasks import bundle_hash
from fedmed.errors import UserError


@dataclass(frozen=True)
class Facts:
    """A site as its limits see it: name, and number of training items."""

    site: str
    num_train: int


def site_in_file(config: SiteConfig) -> tuple[str, int]:
    """Name of the site in its data file, and number of training items. Raises `UserError`.

    The only site of a file may have any name; of several, the one that bears the name in site.yaml is meant.
    """
    from fedmed.data.site_file import SiteFile

    if not config.data.exists():
        raise UserError(f"there is no file {config.data}; correct `data` in site.yaml")
    with SiteFile.open(config.data) as file:
        found = [s for s in file.sites if len(file.sites) == 1 or config.name in (s.name, s.group)]
        if not found:
            names = ", ".join(site.name for site in file.sites[:5])
            raise UserError(
                f"{config.data} has {len(file.sites)} sites ({names}), none of which is {config.name!r}; correct `name`"
            )
        return found[0].name, found[0].n_train


def own_bundle_hash() -> str:
    """SHA-256 of the bundle that this installation hands in, and so of the one that a site of this version expects."""
    with tempfile.TemporaryDirectory(prefix="fedmed-") as folder:
        return bundle_hash(bundle.write_stub(Path(folder) / "app"))
