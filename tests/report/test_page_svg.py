"""Figures as inline SVG: attributes instead of styles, colours of the page, names of their own."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from fedmed.report.page import svg
from fedmed.report.page.plots import bars, curves, last_of

NAN = float("nan")


def parsed(figure: Markup) -> ElementTree.Element:
    """The figure as a tree."""
    return ElementTree.fromstring(str(figure))


def test_a_curve_figure_is_clean() -> None:
    figure = curves(
        "c",
        "bacc",
        {"a<b": {1: 0.1, 2: 0.5}, "$x$": {1: 0.2, 2: NAN}},
        {"a<b": 0, "$x$": 8},
        {"clean": {1: 0.3, 2: 0.4}},
    )
    text = str(figure.svg)
    root = parsed(figure.svg)
    assert root.attrib["role"] == "img" and root.attrib["aria-labelledby"] == "c-t c-d"
    assert [child.tag for child in root][:2] == ["title", "desc"]
    assert "a&lt;b 0.500, $x$ 0.200; mean of sites 0.500" in text
    assert "style=" not in text and "xmlns" not in text and "<metadata" not in text and "http" not in text
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert len(ids) == len(set(ids)) and all(name.startswith("c-") for name in ids)
    lines = {node.attrib["data-series"]: node for node in root.iter("g") if "data-series" in node.attrib}
    assert set(lines) == {"0", "8"} and lines["0"].find("title").text == "a<b: 0.500"  # type: ignore[union-attr]
    strokes = {n.attrib.get("stroke") for n in root.iter("path")}
    assert {"var(--s0)", "var(--s1)", "currentColor", "var(--grid)"} <= strokes
    assert not re.search(r"#[0-9a-f]{6}", text)
    assert not re.search(r"\d\.\d{2,}", re.sub(r">[^<]*<", "><", text).replace(str(root.attrib["viewBox"]), ""))


def test_two_figures_share_no_name() -> None:
    first, second = (curves(name, "x", {"a": {1: 0.1, 2: 0.2}}, {"a": 0}).svg for name in ("p", "q"))
    ids = [re.findall(r' id="([^"]+)"', str(figure)) for figure in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    assert str(first).replace('"p-', '"q-').replace("#p-", "#q-").count("#q-") == str(second).count("#q-")


def test_undefined_values_are_gaps_and_dashes() -> None:
    assert last_of({1: 0.2, 2: 0.3, 3: NAN}) == 0.3 and str(last_of({1: NAN})) == "nan"
    figure = bars("b", "dice", {"a": 0.5, "b": NAN}, {"a": 0, "b": 1}, {"b"}, 0.5)
    assert "a 0.500, b -; mean 0.500" in str(figure.svg) and "asterisk" in figure.caption
    labels = [node.text for node in parsed(figure.svg).iter("text")]
    assert "a" in labels and "b *" in labels


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("M 0.04 -0.04 L 12.3456 7.95", "M 0 0 L 12.3 8"),
        ("rotate(-90 3.25 1e-05)", "rotate(-90 3.2 1e-05)"),
        ("1234.56", "1234.6"),
    ],
)
def test_rounding(text: str, found: str) -> None:
    assert svg._round(text) == found


def test_labels_are_printable_and_short() -> None:
    assert svg.plain("a\x07b\nc") == "a b c"
    assert svg.plain("x" * 40) == "x" * 12 + "..." + "x" * 12 and svg.plain("x" * 28) == "x" * 28
