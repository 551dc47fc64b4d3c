"""Compare the project with reference vectors: `python tests/conformance.py DIR`.

Every `<method>__<function>__<case>.npz` in DIR goes to the adapter of its kind. One line per file: `pass`, `FAIL` with
the worst output and its largest absolute error, or `no adapter`. The last line reads `N passed, N failed, N skipped` (a
file without adapter is skipped); the exit code is 1 when a file failed, 2 when there is no file to compare.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
Adapter = Callable[[Mapping[str, Any]], list[tuple[str, float, float]]]


@dataclass(frozen=True)
class Outcome:
    """Result for one file: status `pass`, `FAIL` or `no adapter`, and for a failure what differs and by how much."""

    name: str
    status: str
    detail: str = ""

    def line(self) -> str:
        """The line that is printed."""
        return " ".join(part for part in (self.name, self.status, self.detail) if part)


def adapters() -> dict[str, Adapter]:
    """Collect the adapters of all files `conformance_*.py` beside this one, by kind."""
    found: dict[str, Adapter] = {}
    for folder in (HERE, HERE.parent):  # run as a script, the checkout's packages are not on the path
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    for path in sorted(HERE.glob("conformance_*.py")):
        found.update(importlib.import_module(path.stem).ADAPTERS)
    return found


def kind_of(path: Path) -> str:
    """Give `<method>__<function>` of a file name."""
    return path.stem.rpartition("__")[0]


def check(path: Path, known: Mapping[str, Adapter]) -> Outcome:
    """Run one file through its adapter. An adapter that raises is a failure."""
    adapter = known.get(kind_of(path))
    if adapter is None:
        return Outcome(path.name, "no adapter")
    try:
        with np.load(path, allow_pickle=False) as archive:
            compared = adapter({key: archive[key] for key in archive.files})
    except Exception as error:  # one broken case must not hide the others
        return Outcome(path.name, "FAIL", f"raised {type(error).__name__}: {error}")
    if not compared:
        return Outcome(path.name, "FAIL", "nothing was compared")
    failed = [entry for entry in compared if not entry[1] <= entry[2]]
    if not failed:
        return Outcome(path.name, "pass")
    key, worst, _ = max(failed, key=lambda entry: entry[1])
    return Outcome(path.name, "FAIL", f"{key} {worst:.3g}")


def run(folder: Path) -> list[Outcome]:
    """Check all `.npz` files of a folder, by name."""
    known = adapters()
    return [check(path, known) for path in sorted(folder.glob("*.npz"))]


def main(arguments: list[str]) -> int:
    """Print one line per file and the totals; give the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python tests/conformance.py DIR   (a folder with .npz reference vectors)", file=sys.stderr)
        return 2
    outcomes = run(Path(arguments[0]))
    for outcome in outcomes:
        print(outcome.line())
    count = {status: sum(o.status == status for o in outcomes) for status in ("pass", "FAIL", "no adapter")}
    print(f"{count['pass']} passed, {count['FAIL']} failed, {count['no adapter']} skipped")
    return 1 if count["FAIL"] else (0 if outcomes else 2)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
