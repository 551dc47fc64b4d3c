"""Example cases as small JPEG images: what the sites (and the coordinator, of its own file) kept of their last evaluation.

Names of items are never read. A page shows the cases of at most `MOST_SITES` sites, the worst and the best ones first, every image
at most `SIDE` pixels a side, so that it stays below a few megabytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import UserError
from fedmed.report.page.parts import Block, Picture, Pictures, Text
from fedmed.report.page.run_data import RunData
from fedmed.report.tables import show
from fedmed.report.values import number
from fedmed.report.write import UNREADABLE, read_overlay

MOST_SITES, MOST_CASES, MOST_CHANNELS = 12, 3, 4
SIDE, QUALITY = 144, 82
_GAP = 4  # pixels between tiles
_IGNORED = 255  # not annotated
# Outlines by class: first foreground class yellow, then the colours of the figures; all of them on grey and on skin.
_OUTLINES = ((255, 225, 25), (86, 180, 233), (255, 110, 60), (0, 200, 140), (230, 140, 200), (255, 255, 255))
Pixels = NDArray[np.uint8]


def read_examples(path: Path) -> dict[str, Any]:
    """Read `examples.npz` of a site: image, classes, probability, truth (and rank, score). Raises `UserError` for anything else."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable npz file ({type(error).__name__})") from error
    if not {"image", "classes", "probability", "truth"} <= set(found):
        raise UserError(f"{path}: expected arrays image, classes, probability and truth")
    return found


def blocks(run: RunData, most_sites: int = MOST_SITES) -> list[Block]:
    """Pictures of the example cases, a block per site; [] where nobody kept any."""
    folders = run.site_folders()
    kept = [site for site, path in folders.items() if _has_examples(path)]
    chosen = _extremes({site: run.scores.get(site, math.nan) for site in kept}, most_sites)
    found: list[Block] = []
    if _has_examples(run.central_folder):
        found += _of_folder(run, run.central_folder, "Central test items")
    for site in chosen:
        found += _of_folder(run, folders[site], _called(run, site))
    if found and len(chosen) < len(kept):
        found.insert(0, Text(f"{len(chosen)} of {len(kept)} sites: the best and the worst of them.", "note"))
    return found


def _has_examples(path: Path) -> bool:
    return (path / "overlay.npz").is_file() or (path / "examples.npz").is_file()


def _called(run: RunData, site: str) -> str:
    value = run.scores.get(site, math.nan)
    words = [f"{run.metric} {show(value)}"] if run.metric and not math.isnan(value) else []
    words += ["corrupted training data"] if site in run.noisy else []
    return f"{site}: {', '.join(words)}" if words else site


def _extremes(scores: Mapping[str, float], most: int) -> list[str]:
    """At most `most` sites, half from either end of the scores; in the order of their names."""
    order = sorted(scores, key=lambda site: (math.isnan(scores[site]), scores[site], site))
    if len(order) > most:
        order = order[: most // 2] + order[len(order) - (most - most // 2) :]
    return sorted(order)


def _of_folder(run: RunData, path: Path, title: str) -> list[Block]:
    channels = [str(c) for c in run.model.get("channels", ())]
    try:
        if (path / "overlay.npz").is_file():
            pictures = _overlays(read_overlay(path / "overlay.npz"), channels, run.model.get("classes", ()))
        else:
            pictures = _examples(read_examples(path / "examples.npz"), channels)
    except (UserError, ValueError, IndexError, TypeError) as error:  # a broken example costs itself and nothing else
        return [Text(f"{title}: the stored cases cannot be shown ({type(error).__name__}).", "warn")]
    return [Pictures(title, pictures)] if pictures else []


def _overlays(cases: Mapping[str, Any], channels: Sequence[str], classes: Sequence[str]) -> list[Picture]:
    found = []
    for i in range(min(MOST_CASES, len(cases["image"]))):
        views, names = _views(cases["image"][i], channels)
        ground = max(views, key=lambda v: float(np.ptp(v)))  # a modality that is missing is flat
        tiles = [_tile(view) for view in views]
        tiles += [_outlined(ground, cases[kind][i]) for kind in ("reference", "prediction")]
        lines = _ranked(cases, i, "Dice")
        lines.append(f"{', '.join(names)}, reference, prediction")
        alt = f"{lines[0]}: {', '.join(names)}; reference with {_areas(cases['reference'][i], classes)}; "
        alt += f"prediction with {_areas(cases['prediction'][i], classes)}."
        found.append(_picture(tiles, alt, lines))
    return found


def _examples(cases: Mapping[str, Any], channels: Sequence[str]) -> list[Picture]:
    classes, found = [str(c) for c in cases["classes"]], []
    for i in range(min(MOST_CASES, len(cases["image"]))):
        prob, truth = np.asarray(cases["probability"][i], dtype=np.float64), cases["truth"][i]
        single = np.ndim(truth) == 0
        lines = _ranked(cases, i, "" if single else "share correct")
        lines += _single(prob, int(truth), classes) if single else _several(prob, np.asarray(truth), classes)
        views, names = _views(cases["image"][i], channels)
        lines += [", ".join(names)] if len(views) > 1 else []
        found.append(_picture([_tile(view) for view in views], ". ".join(lines) + ".", lines))
    return found


def _single(prob: NDArray[np.float64], truth: int, classes: Sequence[str]) -> list[str]:
    guess = int(prob.argmax()) if np.isfinite(prob).all() else None
    said = "none" if guess is None else f"{classes[guess]} ({prob[guess]:.2f})"
    return [f"true: {classes[truth]} ({prob[truth]:.2f})", f"predicted: {said}"]


def _several(prob: NDArray[np.float64], truth: NDArray[Any], classes: Sequence[str]) -> list[str]:
    present = [name for name, flag in zip(classes, truth, strict=True) if flag > 0.5]
    unknown = [name for name, flag in zip(classes, truth, strict=True) if not flag >= 0]
    called = [f"{name} ({p:.2f})" for name, p in zip(classes, prob, strict=True) if p > 0.5]
    lines = [f"true: {', '.join(present) or 'none'}", f"predicted: {', '.join(called) or 'none'}"]
    return lines + ([f"not known: {', '.join(unknown)}"] if unknown else [])


def _ranked(cases: Mapping[str, Any], place: int, what: str) -> list[str]:
    """ "best case: Dice 0.91", without the score where `what` is ""; files of old say neither rank nor score."""
    rank = f"{cases['rank'][place]} case" if "rank" in cases else f"case {place + 1}"
    scores = cases.get("score", cases.get("dice"))
    value = math.nan if scores is None else number(float(scores[place]))
    return [rank if math.isnan(value) or not what else f"{rank}: {what} {value:.2f}"]


def _areas(mask: Any, classes: Sequence[str]) -> str:
    """Pixels of every class in a label map, for those who cannot see it."""
    counts = {int(v): int((np.asarray(mask) == v).sum()) for v in np.unique(mask) if v not in (0, _IGNORED)}
    names = {v: str(classes[v]) if v < len(classes) else f"class {v}" for v in counts}
    return ", ".join(f"{counts[v]} pixels of {names[v]}" for v in counts) or "no foreground"


def _views(image: Any, channels: Sequence[str]) -> tuple[list[Pixels], list[str]]:
    """An image (H, W[, C]) as RGB tiles: one for colour and for grey, one per channel (at most `MOST_CHANNELS`) otherwise."""
    image = np.asarray(image)
    image = image[..., None] if image.ndim == 2 else image
    count = image.shape[-1]
    if count == 3 and list(channels) in ([], ["R", "G", "B"]):
        return [_stretch(image)], ["image"]
    names = list(channels) if len(channels) == count else [f"channel {c + 1}" for c in range(count)]
    shown = range(min(count, MOST_CHANNELS))
    return [_stretch(np.repeat(image[..., c : c + 1], 3, axis=-1)) for c in shown], ["image"] if count == 1 else names[
        : len(shown)
    ]


def _stretch(image: NDArray[Any]) -> Pixels:
    """Any range to 0..255; a flat image stays flat grey."""
    values = image.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.full(image.shape, 96, dtype=np.uint8)
    return ((values - low) * (255 / (high - low))).astype(np.uint8)


def _tile(image: Pixels) -> Pixels:
    """An RGB image with its longer side at `SIDE` pixels."""
    from PIL import Image

    rows, columns = image.shape[:2]
    scale = SIDE / max(rows, columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    how = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize(size, how))


def _outlined(image: Pixels, mask: Any) -> Pixels:
    """The image with a line two pixels wide inside the border of every class; pixels that are not annotated are darkened."""
    tile = _tile(image).copy()
    mask = np.asarray(mask)
    rows, columns = (np.arange(tile.shape[axis]) * mask.shape[axis] // tile.shape[axis] for axis in (0, 1))
    large = mask[rows][:, columns]
    tile[large == _IGNORED] //= 2
    for label in (int(v) for v in np.unique(mask) if v not in (0, _IGNORED)):
        inside = large == label
        core = np.pad(inside, 2, constant_values=True)
        for axis in (0, 1):
            core = np.logical_and.reduce([np.roll(core, step, axis) for step in (-2, -1, 0, 1, 2)])
        tile[inside & ~core[2:-2, 2:-2]] = _OUTLINES[(label - 1) % len(_OUTLINES)]
    return tile


def _picture(tiles: Sequence[Pixels], alt: str, lines: Sequence[str]) -> Picture:
    """Tiles as one JPEG: up to three side by side, more of them in two rows."""
    from PIL import Image

    columns = len(tiles) if len(tiles) <= 3 else (len(tiles) + 1) // 2
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 128, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (height + _GAP), place % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = tile
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    uri = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Picture(uri, sheet.shape[1], sheet.shape[0], alt, lines)
