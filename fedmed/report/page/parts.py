"""What a page consists of: sections of blocks, plain data that the templates turn into HTML.

Every text here is plain text and is escaped by the templates; only `Figure.svg` is markup, made by `fedmed.report.page.svg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph. `tone`: "" plain, "lead" the sentence that matters, "note" small print, "warn" something that is wrong."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and its value, side by side where there is room; `wide` ones, for long values, below each other."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `mark`: "best", "tied", "yes", "bad", or "heat0" .. "heat9" (share of the largest, in tenths)."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A row; its first cell is its header. `series`: number of the line it belongs to in the figures; `foot`: set apart."""

    cells: Sequence[Cell | str]
    series: int | None = None
    foot: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a caption; a wide one scrolls inside its own box. `note` stands below it."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing as inline SVG, which carries its own title and description, and its caption."""

    kind: ClassVar[str] = "figure"
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room. `legend`: (number of the series, name) of what they have in common."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    legend: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Picture:
    """An image as data URI of `width` x `height` pixels with its alternative text and the lines below it."""

    uri: str
    width: int
    height: int
    alt: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side under a name; `small` ones have three in a row on a telephone."""

    kind: ClassVar[str] = "pictures"
    title: str
    pictures: Sequence[Picture]

    @property
    def small(self) -> bool:
        """Whether all of them are narrow."""
        return all(picture.width <= 200 for picture in self.pictures)


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font, as it is; long lines scroll."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are folded away under a title until somebody opens them, or follows a link to `anchor`."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Block]
    anchor: str = ""


@dataclass(frozen=True)
class Links:
    """A line of links to anchors of the page, as (anchor, text), after a few words."""

    kind: ClassVar[str] = "links"
    before: str
    targets: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Beside:
    """Blocks side by side where there is room."""

    kind: ClassVar[str] = "beside"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Group:
    """Blocks under a heading of the third level."""

    kind: ClassVar[str] = "group"
    title: str
    blocks: Sequence[Block]


Block: TypeAlias = Text | Facts | Table | Figures | Pictures | Code | Links | Fold | Beside | Group


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of the second level; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page. `patients`: it holds images of patients or phantoms."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)
    patients: bool = False


def rows_of(rows: Sequence[Sequence[str]], foot: int = 0, series: dict[str, int] | None = None) -> list[Row]:
    """Rows of plain text; the last `foot` are set apart. `series`: name in the first cell -> number of its line."""
    known = series or {}
    last = len(rows) - foot
    return [Row(row, known.get(row[0]) if i < last else None, i >= last) for i, row in enumerate(rows)]


def has_pictures(blocks: Sequence[Block]) -> bool:
    """Whether any block, at any depth, shows pictures."""
    return any(
        isinstance(block, Pictures) or (isinstance(block, (Fold, Beside, Group)) and has_pictures(block.blocks))
        for block in blocks
    )
