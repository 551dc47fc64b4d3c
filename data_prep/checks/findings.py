"""What the check of a site file finds: an error, a warning or a note, with counts and row numbers, never with identifiers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SEVERITIES = ("error", "warning", "note")  # the worst first


@dataclass(frozen=True)
class Finding:
    """One thing found. severity: of `SEVERITIES`; code: its kind, a word for machines; text: a sentence; site: name, "" for the file;
    count: items concerned; rows: places (site, row) of a few of them.
    """

    severity: str
    code: str
    text: str
    site: str = ""
    count: int = 0
    rows: tuple[tuple[str, int], ...] = ()


@dataclass
class Findings:
    """A list that grows while a file is looked at."""

    found: list[Finding] = field(default_factory=list)

    def add(
        self,
        severity: str,
        code: str,
        text: str,
        site: str = "",
        count: int = 0,
        rows: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Add one, unless the same was found before."""
        finding = Finding(severity, code, text, site, count, tuple(rows))
        if finding not in self.found:
            self.found.append(finding)

    def count(self, severity: str) -> int:
        """How many there are of one severity."""
        return sum(finding.severity == severity for finding in self.found)

    def sorted(self) -> list[Finding]:
        """The worst first, else in the order found."""
        return sorted(self.found, key=lambda finding: SEVERITIES.index(finding.severity))


def number(count: int, one: str, many: str = "") -> str:
    """A count with its noun: "1 image", "3 images"."""
    return f"{count} {one if count == 1 else many or one + 's'}"
