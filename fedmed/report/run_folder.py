"""The run folder: where each file of a run lies, when a folder may be used, and writers that never leave half a file
behind.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.config import folder_name
from fedmed.errors import UserError

Record = dict[str, Any]
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


def write_text(path: Path, text: str) -> Path:
    """Write a text file so that a reader finds either the old content or all of the new; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def json_ready(value: Any) -> Any:
    """Give `value` as plain JSON data: numbers that JSON lacks (NaN, infinities) become None, arrays lists, dataclasses
    and mappings dicts.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_ready({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return [json_ready(v) for v in sorted(value, key=str)]
    if isinstance(value, Iterable) and not hasattr(value, "tolist"):
        return [json_ready(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars too, without importing either
        return json_ready(value.tolist())
    return str(value)


def write_json(path: Path, value: Any) -> Path:
    """Write JSON atomically; NaN and infinities become null."""
    return write_text(path, json.dumps(json_ready(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV atomically; columns are the union of the keys in order of first appearance, missing and
    undefined cells stay empty.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()})
    return write_text(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; is {path.parent} a run folder?") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


def read_history(path: Path) -> list[Record]:
    """Read `history.jsonl` (or the one in a run folder) as a list of records.

    A broken last line is what a killed run leaves and is skipped; a broken line elsewhere raises `UserError`.
    """
    path = path / "history.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; is {path.parent} a run folder?") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
    return records


def collect_cases(folder: RunFolder) -> Path | None:
    """Join `sites/<site>/cases.csv` into the run's `cases.csv` with a leading column `site`; None when no site has
    one.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.sites.glob("*/cases.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            rows += [{"site": path.parent.name, **row} for row in csv.DictReader(stream)]
    return write_csv(folder.cases, rows) if rows else None
