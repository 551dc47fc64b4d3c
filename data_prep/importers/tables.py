"""Label tables as hospitals export them: CSV with any of three separators, a byte-order mark, quotes, and cells that are missing.

No cell of a table reaches an error text: cells may hold names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import UserError

SEPARATORS = ",;\t"
MAX_BYTES = 1 << 30
ABSENT = ("", "na", "n/a", "nan", "null")  # cells that say nothing, in lower case; "none" and "-" may be classes


@dataclass(frozen=True)
class Table:
    """A table with a header line. rows: one list per line, as long as `columns`, cells without spaces around them."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def index(self, column: str) -> int:
        """Place of a column, whatever its case. Raises UserError, which quotes no other column: a table without header begins with cells."""
        places = [i for i, name in enumerate(self.columns) if name == column]
        places = places or [i for i, name in enumerate(self.columns) if name.casefold() == column.casefold()]
        if not places:
            raise UserError(
                f"{self.path}: none of the {len(self.columns)} columns in its first line is called {column!r}"
            )
        if len(places) > 1:
            raise UserError(
                f"{self.path}: {len(places)} columns are called {column!r}; rename all but the one that is meant"
            )
        return places[0]

    def column(self, name: str) -> list[str]:
        """All cells of a column."""
        place = self.index(name)
        return [row[place] for row in self.rows]


def read_table(path: Path, what: str = "table") -> Table:
    """Read a CSV file (UTF-8, with or without a byte-order mark, else Windows-1252; separated by comma, semicolon or tab).

    Short lines are filled with empty cells, cells beyond the header are dropped, empty lines left out. Raises UserError for a file that
    cannot be read or has no header.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{what} {path}: larger than {MAX_BYTES >> 20} MiB. Split it.")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    text = _text(content)
    first = text.lstrip().partition("\n")[0]
    if not first or "\0" in first:
        raise UserError(
            f"{what} {path}: expected CSV text with a header line, found {'no text' if first else 'nothing'}"
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(first), skipinitialspace=True)
    try:
        found = [tuple(cell.strip() for cell in row) for row in reader]
    except csv.Error as error:
        raise UserError(
            f"{what} {path}: no valid CSV from line {reader.line_num} on: a quote that is not closed, or a cell of more than "
            f"{csv.field_size_limit()} characters. Leave such columns out and export it again."
        ) from error
    filled = [row for row in found if any(row)]
    if not filled:
        raise UserError(f"{what} {path}: expected CSV text with a header line, found empty cells")
    columns, rows = filled[0], filled[1:]
    width = len(columns)
    return Table(path, columns, tuple((*row, *[""] * (width - len(row)))[:width] for row in rows))


def is_absent(cell: str) -> bool:
    """Whether a cell says nothing."""
    return cell.strip().casefold() in ABSENT


def numbers(cells: Sequence[str]) -> list[float] | None:
    """Cells as numbers (a decimal comma is read too); None when one of them is none."""
    try:
        return [float(cell.replace(",", ".")) for cell in cells]
    except ValueError:
        return None


def _text(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # "Unicode text" of spreadsheet programs
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _separator(header: str) -> str:
    """The separator found most often outside quotes in the header line."""
    bare = "".join(header.split('"')[::2])
    return max(SEPARATORS, key=bare.count)
