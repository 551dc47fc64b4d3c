"""Put the tables of comparisons into docs/results.md, so that what stands there is what `fedmed compare` wrote.

    python docs/build_results.py runs/compare            fill in the tables of the comparisons in this folder
    python docs/build_results.py runs/compare --check    exit status 1 if a table is another one

The tables of a comparison stand between the lines `<!-- comparison: NAME-VARIANT -->` and `<!-- end -->`; they are the file tables.md of the
folder NAME-VARIANT, without its heading and description.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "results.md"
_PLACE = re.compile(r"(<!-- comparison: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables_of(folder: Path) -> str:
    """The tables of one comparison. Raises FileNotFoundError when it has none."""
    lines = (folder / "tables.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("### "))
    return "\n".join(lines[first:]).rstrip() + "\n"


def filled(page: str, runs: Path) -> tuple[str, list[str]]:
    """The page with the tables in their places, and the names of comparisons that are not in `runs`; their places stay as they are."""
    missing: list[str] = []

    def fill(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}\n{tables_of(runs / found['name'])}\n{found[3]}"
        except FileNotFoundError:
            missing.append(found["name"])
            return found[0]

    return _PLACE.sub(fill, page), missing


def main() -> int:
    """Fill the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with the folders of comparisons")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new, missing = filled(old, options.runs)
    for name in missing:
        print(f"{options.runs / name} has no tables.md; its tables stay as they are", file=sys.stderr)
    if options.check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
