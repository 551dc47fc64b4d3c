"""A matplotlib figure as inline SVG: small, without styles, names or addresses, in the colours of the page's scheme.

The page forbids inline style attributes, so every property becomes an attribute of its own; colours become the variables of
style.css, so one drawing serves the light and the dark scheme; a line that belongs to a series gets its number and a tooltip.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"  # stand for the colours of the page
# Okabe-Ito without black and yellow, as in fedmed.report.figures; style.css has a shade of each for both schemes.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f")
DASHES = ("-", "--", ":")
_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{value: f"var(--s{place})" for place, value in enumerate(SERIES)},
}
_PREFIX = "series-"  # of the gid of a line
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_DEFAULTS = {"stroke-dashoffset": "0", "fill-opacity": "1", "stroke-opacity": "1", "opacity": "1"}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a site may be called "$x$"
    "font.size": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.size": 0, "ytick.major.size": 0,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "lines.markersize": 4,
}  # fmt: skip


def plain(text: str, longest: int = 28) -> str:
    """Text for a label: without control characters, cut in the middle when it is long."""
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    half = (longest - 3) // 2
    return clean if len(clean) <= longest else f"{clean[:half]}...{clean[-half:]}"


def series_id(number: int) -> str:
    """The gid of an artist that belongs to series `number`."""
    return f"{_PREFIX}{number}"


def colour(number: int) -> str:
    """The colour of a series."""
    return SERIES[number % len(SERIES)]


def dash(number: int) -> str:
    """The dash pattern of a series: colours are used up first."""
    return DASHES[(number // len(SERIES)) % len(DASHES)]


def inline(figure: Figure, name: str, title: str, description: str, tips: Mapping[int, str] | None = None) -> Markup:
    """Turn a figure into inline SVG.

    `name`: unique on the page, prefix of all ids. `title`, `description`: what a screen reader says, with the numbers. `tips`: series
    -> text shown beside the pointer.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", stream.getvalue()))  # what matplotlib just wrote
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
    _drop(root, ("metadata", "style"))
    used = set(re.findall(r"""#([\w.:-]+)\)?["']""", ElementTree.tostring(root, encoding="unicode")))
    for node in root.iter():
        _clean(node, name, used, tips or {})
    _collapse(root)
    box = root.attrib["viewBox"].split()
    root.attrib = {
        "viewBox": root.attrib["viewBox"], "width": _round(box[2]), "height": _round(box[3]), "role": "img",
        "aria-labelledby": f"{name}-t {name}-d", "stroke-linejoin": "round",
    }  # fmt: skip
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        node = ElementTree.Element(tag, {"id": f"{name}-{tag[0]}"})
        node.text = "".join(c if c.isprintable() else " " for c in text)
        root.insert(place, node)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # every text in it was escaped by ElementTree


def _drop(node: ElementTree.Element, tags: tuple[str, ...]) -> None:
    for child in list(node):
        if child.tag in tags:
            node.remove(child)
        else:
            _drop(child, tags)


def _round(text: str) -> str:
    """Numbers to one decimal: a tenth of a pixel."""
    return _NUMBER.sub(lambda found: f"{round(float(found.group()), 1) + 0.0:g}", text)


def _clean(node: ElementTree.Element, name: str, used: set[str], tips: Mapping[int, str]) -> None:
    """Bring the attributes of one element into the form of the page."""
    found = dict(node.attrib)
    for part in found.pop("style", "").split(";"):
        key, _, value = (piece.strip() for piece in part.partition(":"))
        found[key] = value
    size = re.match(r"(?:\w+ )*([\d.]+)px", found.pop("font", ""))
    if size:
        found["font-size"] = size.group(1)
    for key in ("", "font-family"):
        found.pop(key, None)
    mark = found.pop("id", "")
    node.attrib = {}
    for key, value in found.items():
        value = _COLOURS.get(value.lower(), value).replace("url(#", f"url(#{name}-")
        if key == "href":
            value = value.replace("#", f"#{name}-")
        elif key in ("d", "x", "y", "width", "height", "transform", "stroke-width", "stroke-dasharray", "points"):
            value = " ".join(_round(value).split())
        elif key == "font-size":
            value = value.removesuffix("px")
        if _DEFAULTS.get(key) != value and not (key == "transform" and value.startswith("rotate(0 ")):
            node.attrib[key] = value
    if mark.startswith(_PREFIX):
        number = int(mark.removeprefix(_PREFIX))
        node.attrib |= {"class": "series", "data-series": str(number)}
        if number in tips:
            tip = ElementTree.Element("title")
            tip.text = plain(tips[number], 120)
            node.insert(0, tip)
    elif mark in used:
        node.attrib["id"] = f"{name}-{mark}"
    if node.tag != "text" and node.tag not in ("title", "desc"):
        node.text = None
    node.tail = None


def _collapse(node: ElementTree.Element) -> None:
    """Put the children of groups without attributes in the place of the group; empty groups go."""
    children: list[ElementTree.Element] = []
    for child in list(node):
        _collapse(child)
        if child.tag in ("g", "defs") and not len(child):
            continue
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    node[:] = children
