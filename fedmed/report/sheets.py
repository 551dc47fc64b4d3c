"""Contact sheets: a few images of every site of a site file, with outlines, scribbles and boxes in colour and labels as captions."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from fedmed.data.site_checks import read_splits
from fedmed.data.site_file import SiteFile, SiteInfo
from fedmed.report.tiles import Colour, class_colour, draw_boxes, draw_labels, draw_outlines, tile_image

if TYPE_CHECKING:
    from PIL import Image

GAP, APART, CAPTION = 4, 10, 16  # pixels: between tiles, between images, height of captions
MARGIN, LINE = 116, 1700  # pixels: for titles; width of a line of tiles at most
FONT = 12
_WEAK = ("scribble", "box")
_MAX_PLANES = 4


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet: pixels (tile, tile, 3) uint8 and a caption."""

    pixels: np.ndarray
    caption: str


_Item = list[Tile]  # an image in all its pictures


@dataclass(frozen=True)
class _Source:
    """An open site file, and how large its images are drawn."""

    file: h5py.File
    task: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    tile: int


def contact_sheet(
    path: str | Path | Sequence[str | Path],
    out_png: str | Path,
    per_site: int = 8,
    max_sites: int = 4,
    tile: int = 96,
    seed: int = 0,
) -> Path:
    """Draw `per_site` randomly chosen images for each of the first `max_sites` sites and write a PNG; return its path.

    `path`: one site file or several (drawn below each other). An image is followed by itself with the mask outlined, and with its
    scribbles or boxes, where the file has such, each class in its colour; files with other channels than R, G, B show them
    side by side. Captions: split, and label or channel. `tile`: pixels a side. Only the rows that are shown are read.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    blocks: list[tuple[str, list[_Item]]] = []
    legend: dict[str, Colour] = {}
    for one in paths:
        with SiteFile.open(one) as sites, h5py.File(one, "r") as file:
            source = _Source(file, sites.task, sites.classes, sites.channels, tile)
            for info in sites.sites[:max_sites]:
                title = info.name if len(paths) == 1 else f"{one.stem}\n{info.name}"
                blocks.append((title, _site_items(source, info, per_site, np.random.default_rng([seed, info.n]))))
        if sites.task == "segmentation":
            legend |= {name: class_colour(index) for index, name in enumerate(sites.classes)}
            if not any(tile.caption in _WEAK for _, items in blocks for item in items for tile in item):
                legend.pop(sites.classes[0], None)  # outlines leave background alone
    return save(compose(blocks, legend, tile), Path(out_png))


def _site_items(source: _Source, info: SiteInfo, per_site: int, rng: np.random.Generator) -> list[_Item]:
    node = source.file[info.group] if info.group else source.file
    split = np.full(info.n, "", dtype=object)
    for name, rows in read_splits(node, f"site {info.name!r}", info.n).items():
        split[rows] = name
    chosen = np.sort(rng.choice(info.n, min(info.n, max(1, per_site)), replace=False)).tolist() if info.n else []
    return [_tiles(source, node, row, str(split[row])) for row in chosen]


def _tiles(source: _Source, node: h5py.Group, row: int, split: str) -> _Item:
    """The pictures of one image: its channels, then what is annotated."""
    image, side = node["image"][row], source.tile
    planes = [image]
    captions = [_label(source, node, row)]
    if image.ndim == 3 and source.channels != ("R", "G", "B"):
        planes = [image[..., channel] for channel in range(min(image.shape[2], _MAX_PLANES))]
        present = node["modality_present"][row] if "modality_present" in node else np.ones(image.shape[2])
        captions = [n if p else f"no {n}" for n, p in zip(source.channels, present, strict=False)][: len(planes)]
    shown = [tile_image(plane, side) for plane in planes]
    pictures = list(zip(shown, captions, strict=True))
    base = shown[min(1, len(shown) - 1)]
    if source.task == "segmentation":
        pictures += _annotated(source, node, row, base, split == "train")
    return [
        Tile(pixels, ": ".join(filter(None, [split if not place else "", caption])))
        for place, (pixels, caption) in enumerate(pictures)
    ]


def _annotated(
    source: _Source, node: h5py.Group, row: int, base: np.ndarray, train: bool
) -> list[tuple[np.ndarray, str]]:
    """The picture with mask, scribbles and boxes, one after the other; without those that say nothing of it."""
    pictures, num_classes = [], len(source.classes)
    for name in ("mask", *_WEAK):
        if name not in node or node[name].shape != node["image"].shape[:3]:
            continue
        labels = node[name][row]
        ignore = _ignore(source, node, name)
        labels = np.where((labels == ignore) | (labels >= num_classes) | (labels < 0), num_classes, labels)
        if (labels < num_classes).any():
            draw = draw_labels if name == "scribble" else draw_outlines
            pictures.append((draw(base, labels, num_classes), "" if name == "mask" else name))
        elif train and name == node.attrs.get("annotation"):
            pictures.append((base, f"{name}: none"))
    boxes = node["class_boxes"][row] if "class_boxes" in node and "box" not in node else np.zeros((0, 4))
    if boxes.any():
        pictures.append((draw_boxes(base, boxes, node["image"].shape[1:3]), "boxes"))
    return pictures


def _label(source: _Source, node: h5py.Group, row: int) -> str:
    if source.task == "segmentation" or "label" not in node:
        return ""
    label = node["label"][row]
    if source.task == "classification":
        return source.classes[int(label)] if 0 <= label < len(source.classes) else f"class {label}?"
    found = [name for name, flag in zip(source.classes, label, strict=False) if flag]
    return (", ".join(found[:2]) + (" +" if len(found) > 2 else "")) or "none"


def _ignore(source: _Source, node: h5py.Group, name: str) -> int:
    for key in (f"ignore_value_in_{name}", "ignore_value"):
        for holder in (node, source.file):
            if key in holder.attrs:
                return int(holder.attrs[key])
    return len(source.classes)


def compose(blocks: Sequence[tuple[str, list[_Item]]], legend: dict[str, Colour], tile: int) -> Image.Image:
    """Put tiles, titles, captions and the legend on one white sheet; the images of a site fill lines of equal length."""
    from PIL import Image, ImageDraw, ImageFont

    wide = max((len(item) for _, items in blocks for item in items), default=1) * (tile + GAP) + APART
    most = max((len(items) for _, items in blocks), default=1)
    across = -(-most // -(-most * wide // max(LINE, wide))) if most else 1
    lines = [max(1, -(-len(items) // across)) for _, items in blocks]
    height = tile + GAP + CAPTION
    top = CAPTION + GAP if legend else 0
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    font = ImageFont.load_default(FONT)
    named = sum(pen.textlength(name, font=font) + 30 for name in legend)
    size = (MARGIN + max(across * wide, int(named)), top + sum(lines) * height + GAP * len(blocks))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    left = float(MARGIN)
    for name, colour in legend.items():
        pen.rectangle((left, 3, left + 9, 12), fill=colour, outline="grey")
        pen.text((left + 14, 0), name, fill="black", font=font)
        left += pen.textlength(name, font=font) + 30
    for (title, items), count in zip(blocks, lines, strict=True):
        said = "\n".join(line for part in title.splitlines() for line in textwrap.wrap(part, 17))
        pen.multiline_text((4, top), said, fill="black", font=font)
        for place, item in enumerate(items):
            x, y = MARGIN + place % across * wide, top + place // across * height
            for one in item:
                sheet.paste(Image.fromarray(one.pixels), (x, y))
                pen.text((x, y + tile), _cut(one.caption, tile, pen, font), fill="black", font=font)
                x += tile + GAP
        top += count * height + GAP
    return sheet


def _cut(text: str, width: int, pen: Any, font: Any) -> str:
    """As much of a caption as fits under its tile."""
    while text and pen.textlength(text, font=font) > width:
        text = text[:-1]
    return text


def save(sheet: Image.Image, out: Path) -> Path:
    """Write the sheet as a PNG with all of its colours (a palette would invent edges in smooth images), atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        sheet.save(partial, format="PNG", optimize=True)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out
