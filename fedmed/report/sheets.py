"""Contact sheets: a few images of every site of a site file, with masks as outlines and labels as captions."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmed.data.site_file import SiteData, SiteFile

OUTLINE = (255, 235, 59)
GAP = 3  # pixels between images


def contact_sheet(
    path: str | Path | Sequence[str | Path],
    out_png: str | Path,
    per_site: int = 8,
    max_sites: int = 4,
    tile: int = 96,
    seed: int = 0,
) -> Path:
    """Draw one row of `per_site` randomly chosen images for each of the first `max_sites` sites and write a PNG; return
    its path.

    `path`: one site file or several (drawn below each other). Every second column repeats its left neighbour with the
    mask outlined when the file has masks; files with three contrasts show them side by side instead of as colours.
    `tile`: pixels a side of one image.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    paths = [path] if isinstance(path, (str, Path)) else list(path)
    rows: list[tuple[str, np.ndarray, list[str]]] = []
    for file in paths:
        with SiteFile.open(file) as sites:
            for info in sites.sites[:max_sites]:
                data = sites.site(info.group or info.name, allow_empty_train=True)
                title = info.name if len(paths) == 1 else f"{Path(file).stem}\n{info.name}"
                rows.append((title, *_row(data, per_site, tile, np.random.default_rng([seed, info.n]))))
    width = max(strip.shape[1] for _, strip, _ in rows)
    heights = [strip.shape[0] + (14 if any(captions) else 0) + GAP for _, strip, captions in rows]
    dpi, margin = 100, 78
    figure = Figure(figsize=((width + margin) / dpi, sum(heights) / dpi), dpi=dpi)
    top = sum(heights)
    for (name, strip, captions), height in zip(rows, heights, strict=True):
        top -= height
        text = height - GAP - strip.shape[0]
        box = (
            margin / (width + margin),
            (top + text) / sum(heights),
            strip.shape[1] / (width + margin),
            strip.shape[0] / sum(heights),
        )
        axes = figure.add_axes(box)
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.axis("off")
        axes.text(-6, strip.shape[0] / 2, name, ha="right", va="center", fontsize=6)
        for index, caption in enumerate(captions):
            axes.text((index + 0.5) * (tile + GAP), strip.shape[0] + 1, caption, ha="center", va="top", fontsize=5)
    return _save(figure, Path(out_png))


def _row(data: SiteData, per_site: int, tile: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    planes = len(data.channels) if data.image.ndim == 4 and data.channels != ("R", "G", "B") else 1
    masks = data.task == "segmentation"
    step = planes + masks
    chosen = np.sort(rng.choice(len(data.image), min(len(data.image), max(1, per_site // step)), replace=False))
    tiles, captions = [], []
    for item in chosen:
        views = [data.image[item][..., c] for c in range(planes)] if planes > 1 else [data.image[item]]
        shown = [_enlarge(_colour(view), tile) for view in views]
        if masks:
            truth = data.target if data.eval_target is None else data.eval_target
            shown.append(_outlined(shown[min(1, planes - 1)], _enlarge(truth[item], tile)))
        tiles += shown
        captions += [_caption(data, int(item), plane) for plane in range(len(shown))]
    blank = np.full((tile, GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([part for one in tiles for part in (one, blank)], axis=1), captions


def _caption(data: SiteData, item: int, plane: int) -> str:
    if data.task == "segmentation":
        return (
            data.channels[plane]
            if data.channels != ("R", "G", "B") and len(data.channels) > 1 and plane < len(data.channels)
            else ""
        )
    if data.task == "classification":
        return data.classes[int(data.target[item])]
    found = [name for name, flag in zip(data.classes, data.target[item], strict=True) if flag]
    return (", ".join(found[:2]) + (" +" if len(found) > 2 else "")) or "none"


def _colour(image: np.ndarray) -> np.ndarray:
    """Any stored image as RGB uint8: integers by their range, floats by their own."""
    if image.dtype != np.uint8:
        top = 65535.0 if image.dtype == np.uint16 else max(float(np.abs(image).max()), 1e-6)
        image = np.clip(image.astype(np.float32) * (255.0 / top), 0, 255).astype(np.uint8)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _enlarge(image: np.ndarray, tile: int) -> np.ndarray:
    rows, columns = (np.arange(tile) * image.shape[axis] // tile for axis in (0, 1))
    return image[rows][:, columns]


def _outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    out = image.copy()
    out[edge] = OUTLINE
    return out


def _save(figure: object, out: Path) -> Path:
    """Write a palette PNG (a quarter of the bytes of RGB), atomically."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")  # type: ignore[attr-defined]
    buffer.seek(0)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    Image.open(buffer).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(partial, format="PNG", optimize=True)
    partial.replace(out)
    return out
