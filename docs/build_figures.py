"""Draw the figures of the documentation that need no run: weak labels of synthetic images.

    python docs/build_figures.py      writes docs/figures/weak_labels.png (needs matplotlib)

All images are phantoms, made from a seed; the same versions give the same pixels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_prep.corruption.weak_draw import components
from data_prep.corruption.weak_labels import WeakLabels
from data_prep.seeding import Seed
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile

FOLDER = Path(__file__).resolve().parent / "figures"
KINDS = ("mask", "scribble", "noisy_scribble", "point", "block", "box", "image")
COLOURS = np.array([[0, 114, 178], [230, 159, 0]], dtype=np.float64)  # background, lesion; Okabe and Ito
IMAGES = 3
SIDE = 96  # pixels


def overlay(image: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    """An image (H, W, 3) uint8 with labels (H, W) in colour; pixels left open stay as they are."""
    drawn = labels < len(COLOURS)
    blended = image.astype(np.float64)
    blended[drawn] = (1 - strength) * blended[drawn] + strength * COLOURS[labels[drawn]]
    return np.rint(blended).astype(np.uint8)


def weak_labels(path: Path) -> Path:
    """One row per image, one column per kind of weak label."""
    with tempfile.TemporaryDirectory() as folder:
        source = make_phantom(Path(folder) / "lesions.h5", "segmentation", 1, 40, image_size=SIDE, seed=3, lesions=4)
        with SiteFile.open(source) as file:
            site = file.site(file.sites[0].name)
    lesions = [sum(1 for _ in components(mask, 2)) for mask in site.target]
    chosen = np.argsort(lesions, kind="stable")[::-1][:IMAGES]  # those with most lesions
    figure = Figure(figsize=(1.35 * len(KINDS), 1.35 * IMAGES + 0.25), dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(IMAGES, len(KINDS))
    weak = WeakLabels()
    for column, kind in enumerate(KINDS):
        grid[0, column].set_title(kind, fontsize=9)
        rng = Seed(0).rng(f"figure/{kind}")
        for row, item in enumerate(chosen):
            image, mask = site.image[item], site.target[item]
            labels = mask if kind == "mask" else weak.draw(kind, mask, 2, rng)
            axes = grid[row, column]
            axes.imshow(overlay(image, labels, 0.45 if kind in ("mask", "box") else 1.0), interpolation="nearest")
            if kind == "image":
                tag = "lesion" if mask.any() else "no lesion"
                axes.text(SIDE / 2, SIDE - 8, tag, color="white", fontsize=8, ha="center")
            axes.set_axis_off()
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.005, top=1 - 0.25 / (1.35 * IMAGES + 0.25), wspace=0.03, hspace=0.03
    )
    figure.savefig(path, metadata={"Software": None})
    return path


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    print(weak_labels(FOLDER / "weak_labels.png"))
