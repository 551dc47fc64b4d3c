"""The run folder: where each file of a run lies, when a folder may be used, and writers that never leave half a file
behind.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.config import folder_name
from fedmed.errors import UserError
from fedmed.files import write_csv

RAY_LOG = "ray.log"  # output of the ray engine; alone in a folder it is what a run leaves that never began


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; nothing is created by asking for a path."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def history(self) -> Path:
        """One JSON record per site, round and phase."""
        return self.path / "history.jsonl"

    @property
    def cases(self) -> Path:
        """Per-case scores of all sites (simulations only)."""
        return self.path / "cases.csv"

    @property
    def checkpoint(self) -> Path:
        """Folder of the state a run resumes from."""
        return self.path / "checkpoint"

    @property
    def model(self) -> Path:
        """The final global model."""
        return self.path / "model.safetensors"

    @property
    def figures(self) -> Path:
        """Folder of the PNG figures."""
        return self.path / "figures"

    @property
    def summary(self) -> Path:
        """The numbers of the run, JSON."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The same for people, Markdown."""
        return self.path / "report.md"

    @property
    def ray_log(self) -> Path:
        """All output of the run, on the ray engine only."""
        return self.path / RAY_LOG

    @property
    def sites(self) -> Path:
        """Folder with one state folder per site (simulations only)."""
        return self.path / "sites"

    def site(self, name: str) -> Path:
        """State folder of one site."""
        return self.sites / folder_name(name)


def default_out(name: str, root: Path = Path("runs")) -> Path:
    """Give `runs/<name>-<time>`, with a number behind it while such a folder exists."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = root / stem, 2
    while path.exists():
        path, number = root / f"{stem}-{number}", number + 1
    return path


def prepare(path: str | Path, resume: bool = False) -> RunFolder:
    """Create the run folder, or check that the one there may be used.

    A folder that holds anything is refused unless `resume`; resuming needs a folder that holds a run (a `config.yaml`
    or a checkpoint). Raises `UserError`.
    """
    folder = RunFolder(Path(path).expanduser())
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--out {path}: expected a folder, found a file; choose another --out")
    held = sorted(p.name for p in folder.path.iterdir() if p.name != RAY_LOG) if folder.path.is_dir() else []
    if resume and not (folder.config.is_file() or folder.checkpoint.exists()):
        found = "no such folder" if not folder.path.is_dir() else "it has neither config.yaml nor checkpoint/"
        raise UserError(f"--resume: nothing to go on with in {path} ({found}); leave --resume out to start a run there")
    if held and not resume:
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise UserError(
            f"--out {path} is not empty (it holds {shown}); "
            "add --resume to go on with the run in it, or choose another folder"
        )
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot create the folder ({error.strerror}); choose another --out") from error
    return folder


def collect_cases(folder: RunFolder) -> Path | None:
    """Join `sites/<site>/cases.csv` into the run's `cases.csv` with a leading column `site`; None when no site has
    one.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.sites.glob("*/cases.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            rows += [{"site": path.parent.name, **row} for row in csv.DictReader(stream)]
    return write_csv(folder.cases, rows) if rows else None
