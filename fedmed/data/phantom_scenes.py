"""Painters of the four kinds of synthetic images: skin or ultrasound lesions, six skin findings, chest films, brain
slices.

A painter gets a generator, what each image shows and the site's case mix, and returns images in 0..1 before the site's
appearance is applied (float32, (n,S,S,C)) with masks (n,S,S) uint8 or None. Nothing here is anatomy; it only poses
problems like the real ones: vague borders, lesions that look like their surroundings, distractors, findings that hide
each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmed.data.phantom_draw import (
    Outlines,
    column,
    depth,
    draw_outlines,
    grid,
    hairs,
    mix,
    rim,
    smooth_noise,
    soft,
    spots,
    uniform,
)

SKIN = np.array([0.82, 0.63, 0.55], dtype=np.float32)
SKIN_CLASSES = ("even", "ragged", "flecked", "pearly", "ringed", "vascular")
CHEST_FINDINGS = ("opacity", "nodule", "effusion", "wide heart", "band", "collapse")
CONTRASTS = ("T1", "FLAIR", "T1 contrast")


@dataclass(frozen=True)
class CaseMix:
    """What the patients of a site are like: typical lesion radius (image half sides), contrast of lesions (1:
    ordinary), share of hairy or marked images.
    """

    radius: float = 0.42
    contrast: float = 1.0
    clutter: float = 0.5


def _skin(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    tone = SKIN * rng.uniform(0.88, 1.08, (n, 1)).astype(np.float32) + rng.normal(0, 0.02, (n, 3)).astype(np.float32)
    image = np.broadcast_to(tone[:, None, None, :], (n, size, size, 3)).copy()
    relief = 0.035 * smooth_noise(rng, n, size, 0.12) + 0.012 * smooth_noise(rng, n, size, 0.012)
    redness = 0.02 * smooth_noise(rng, n, size, 0.08)
    image += relief[..., None]
    image[..., 0] += redness
    image[..., 1:] -= 0.5 * redness[..., None]
    return image


def _skin_clutter(rng: np.random.Generator, image: np.ndarray, case: CaseMix) -> np.ndarray:
    n, size = image.shape[:2]
    shown = column(rng.random(n) < case.clutter)
    cover = hairs(rng, n, size, 5, 0.017) * shown
    image = mix(
        image, rng.uniform(0.08, 0.35, (n, 1)).astype(np.float32) * np.array([1.0, 0.8, 0.7], np.float32), 0.85 * cover
    )
    glare = spots(rng, n, size, 4, 0.02, 0.05)
    return mix(image, np.ones(3), 0.55 * glare * column(rng.random(n) < 0.4))


def skin_lesions(
    rng: np.random.Generator, n: int, size: int, case: CaseMix, lesions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Close-ups of skin with 1 to `lesions` pigmented lesions each; freckles, hairs, glare and shadows are not part of
    the mask.
    """
    image = _skin(rng, n, size)
    shade = 0.1 * column(uniform(rng, 0, 1, n)) * smooth_noise(rng, n, size, 0.25)
    image += shade[..., None]
    freckles = spots(rng, n, size, 7, 0.03, 0.075) * column(uniform(rng, 0.15, 0.5, n))
    image = mix(image, image * np.array([0.8, 0.62, 0.55], np.float32), freckles)
    mask = np.zeros((n, size, size), dtype=np.uint8)
    wanted = rng.integers(1, lesions + 1, n)
    for lesion in range(lesions):
        present = column(wanted > lesion)
        scale = 1.0 if lesion == 0 else 0.5
        radius = np.clip(case.radius * scale * np.exp(rng.normal(0, 0.3, n)), 0.09, 0.72)
        outline = draw_outlines(rng, n, radius, uniform(rng, 0.03, 0.17, n), 0.35 if lesions == 1 else 0.75)
        inside = depth(outline, size) - 10.0 * (1 - present)
        image = _pigment(rng, image, inside, case)
        mask |= (inside > 0).astype(np.uint8)
    return _skin_clutter(rng, image, case), mask


def _pigment(rng: np.random.Generator, image: np.ndarray, inside: np.ndarray, case: CaseMix) -> np.ndarray:
    """Lay one brown lesion per image over the skin: uneven pigment, a fuzzy border of varying width, parts that nearly
    vanish.
    """
    n, size = image.shape[:2]
    strength = np.clip(case.contrast * uniform(rng, 0.35, 0.95, n), 0.25, 1.0)
    uneven = np.clip(1 + 0.27 * smooth_noise(rng, n, size, 0.1) + 0.12 * smooth_noise(rng, n, size, 0.03), 0.3, 1.6)
    alpha = np.clip(soft(inside, uniform(rng, 0.08, 0.4, n)) * column(strength) * uneven, 0, 1)
    brown = np.array([0.36, 0.2, 0.13], np.float32) + rng.normal(0, 0.05, (n, 3)).astype(np.float32)
    return mix(image, brown, alpha)


def ultrasound(
    rng: np.random.Generator, n: int, size: int, case: CaseMix, lesions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Grey speckled layers with 1 to `lesions` darker lesions each, some with a shadow below; dark ducts and shadows
    are distractors.
    """
    y, x = grid(size)
    wave = 0.12 * smooth_noise(rng, n, size, 0.2)
    layers = 0.5 + 0.13 * np.sin(column(uniform(rng, 3, 7, n)) * (y + wave) + column(uniform(rng, 0, 6, n)))
    image = layers * (1.05 - 0.3 * (y + 1) / 2) + 0.08 * smooth_noise(rng, n, size, 0.1)
    image *= 1 - 0.45 * hairs(rng, n, size, 3, 0.06)
    mask = np.zeros((n, size, size), dtype=np.uint8)
    wanted = rng.integers(1, lesions + 1, n)
    for lesion in range(lesions):
        radius = np.clip(case.radius * (0.8 if lesion == 0 else 0.4) * np.exp(rng.normal(0, 0.3, n)), 0.09, 0.6)
        outline = draw_outlines(
            rng, n, radius, uniform(rng, 0.02, 0.12, n), 0.45 if lesions == 1 else 0.75, elongation=2.0
        )
        inside = depth(outline, size) - 10.0 * (1 - column(wanted > lesion))
        strength = np.clip(case.contrast * uniform(rng, 0.3, 0.8, n), 0.15, 0.9)
        image *= 1 - column(strength) * soft(inside, uniform(rng, 0.06, 0.25, n))
        below = (y > column(outline.y)) * np.exp(-(((x - column(outline.x)) / column(0.6 * radius)) ** 2))
        image *= 1 - 0.35 * below * column((rng.random(n) < 0.4) & (wanted > lesion))
        mask |= (inside > 0).astype(np.uint8)
    image *= 1 - 0.4 * np.exp(-(((x - column(uniform(rng, -1, 1, n))) / 0.12) ** 2)) * column(
        rng.random(n) < case.clutter
    )
    grain = np.hypot(smooth_noise(rng, n, size, 0.011), smooth_noise(rng, n, size, 0.011)) / 1.2533
    image *= 0.45 + 0.55 * grain
    return image[..., None].astype(np.float32), mask


def skin_findings(
    rng: np.random.Generator, labels: np.ndarray, size: int, case: CaseMix, difficulty: float
) -> tuple[np.ndarray, None]:
    """One lesion per image whose class (index into SKIN_CLASSES) shifts the distributions of outline, colour and
    texture; these overlap.

    `difficulty` scales the spread of each class around its mean (1: ordinary, 0: no overlap).
    """
    n = len(labels)
    centre = _CLASS_MEANS[labels]
    trait = centre + difficulty * _CLASS_SPREAD * rng.normal(0, 1, centre.shape)
    irregular, fuzz, dark, pink, variegated, fleck, ring, pale = (trait[:, i].astype(np.float32) for i in range(8))
    image = _skin(rng, n, size)
    image = mix(image, image * np.array([0.8, 0.62, 0.55], np.float32), 0.4 * spots(rng, n, size, 5, 0.03, 0.08))
    radius = np.clip(case.radius * np.exp(rng.normal(0, 0.22, n)), 0.25, 0.65)
    inside = depth(draw_outlines(rng, n, radius, np.clip(irregular, 0.02, 0.3), 0.35), size)
    body = soft(inside, np.clip(fuzz, 0.06, 0.6))
    brown, blood = np.array([0.42, 0.25, 0.16], np.float32), np.array([0.62, 0.2, 0.26], np.float32)
    share = np.clip(pink, 0, 1)[:, None]
    colour = (brown * (1 - share) + blood * share) * rng.uniform(0.85, 1.15, (n, 1)).astype(np.float32)
    uneven = np.clip(1 + column(np.clip(variegated, 0, 0.9)) * smooth_noise(rng, n, size, 0.09), 0.1, 1.8)
    image = mix(image, colour, np.clip(body * column(np.clip(dark, 0.12, 0.95)) * uneven * case.contrast, 0, 1))
    dots = np.clip(1.5 * smooth_noise(rng, n, size, 0.026) - 1.2, 0, 1) * column(np.clip(fleck, 0, 1))
    image = mix(image, np.array([0.93, 0.86, 0.72]), np.clip(1.2 * dots * body, 0, 1))
    core = soft(inside - column(0.55 * radius), 0.25)
    image = mix(image, np.array([0.9, 0.78, 0.74]), core * column(np.clip(pale, 0, 0.9)))
    image = mix(image, colour * 0.6, rim(inside - 0.06, 0.07) * column(np.clip(ring, 0, 0.9)))
    return _skin_clutter(rng, image, case), None


# irregular, fuzz, dark, pink, variegated, fleck, ring, pale core
_CLASS_MEANS = np.array(
    [
        [0.04, 0.24, 0.55, 0.05, 0.12, 0.00, 0.00, 0.00],
        [0.20, 0.26, 0.88, 0.10, 0.55, 0.00, 0.00, 0.05],
        [0.08, 0.12, 0.50, 0.05, 0.20, 0.95, 0.05, 0.00],
        [0.10, 0.38, 0.36, 0.60, 0.20, 0.05, 0.00, 0.45],
        [0.04, 0.24, 0.50, 0.20, 0.10, 0.00, 0.75, 0.65],
        [0.08, 0.12, 0.75, 0.95, 0.20, 0.00, 0.05, 0.00],
    ]
)
_CLASS_SPREAD = np.array([0.04, 0.07, 0.13, 0.17, 0.14, 0.22, 0.16, 0.16])


def chest_films(rng: np.random.Generator, labels: np.ndarray, size: int, case: CaseMix) -> tuple[np.ndarray, None]:
    """Frontal chest-like films; labels (n, L) 0/1 over CHEST_FINDINGS. Ribs, vessels and devices are distractors, faint
    findings are common.
    """
    n = len(labels)
    y, x = grid(size)
    shown = labels.astype(np.float32) * case.contrast * rng.uniform(0.55, 1.2, labels.shape).astype(np.float32)
    opacity, nodule, effusion, wide, band, collapse = (column(shown[:, i]) for i in range(6))
    tilt, scale = column(uniform(rng, -0.06, 0.06, n)), column(uniform(rng, 0.88, 1.08, n))
    px, py = (x + tilt * y) / scale, (y - 0.05) / scale
    image = 0.52 + 0.1 * np.cos(1.4 * px) - 0.05 * py + 0.03 * smooth_noise(rng, n, size, 0.15)
    lungs = []
    for sign in (-1.0, 1.0):
        width = 0.33 + 0.03 * py
        lungs.append(soft(1 - np.hypot((px - sign * 0.45) / width, py / 0.74), 0.35))
    lung = np.clip(lungs[0] + lungs[1], 0, 1)
    image -= 0.36 * lung
    vessels = np.clip(smooth_noise(rng, n, size, 0.025), 0, 2) * np.exp(-((px / 0.55) ** 2))
    image += 0.04 * vessels * lung
    ribs = np.sin(11 * (py + 0.35 * px**2) + column(uniform(rng, 0, 6, n)))
    image += 0.035 * np.clip(ribs, -0.2, 1) * soft(0.92 - np.abs(px), 0.2)
    image += 0.12 * np.exp(-((px / 0.1) ** 2)) * (1 + 0.12 * np.cos(14 * py))
    heart = 0.3 + 0.03 * column(rng.normal(0, 1, n)) + 0.12 * wide
    beat = soft(1 - np.hypot((px - 0.1) / heart, (py - 0.32) / (0.3 + 0.06 * wide)), 0.35)
    image += 0.55 * beat * np.clip(0.82 - image, 0, 1)
    side = column(rng.choice([-1.0, 1.0], n))
    level = 0.62 - 0.35 * column(uniform(rng, 0, 1, n)) * np.minimum(effusion, 1)
    fluid = soft(py - level - 0.25 * (np.abs(px - side * 0.75) - 0.2), 0.15) * (side * px > 0.05)
    image += 0.34 * np.minimum(effusion, 1.0) * fluid * lung
    patch = soft(depth(_in_lung(rng, n, 0.2, 0.2), size), 0.5)
    image += 0.26 * opacity * patch * (0.4 + 0.6 * lung) * (1 + 0.3 * smooth_noise(rng, n, size, 0.03))
    image += 0.3 * nodule * soft(depth(_in_lung(rng, n, 0.075, 0.05), size), 0.08)
    plate = np.abs(py - column(uniform(rng, 0.05, 0.5, n)) - 0.25 * (px - side * 0.5) * side)
    image += 0.24 * band * np.exp(-((plate / 0.035) ** 2)) * np.where(side > 0, lungs[1], lungs[0])
    edge = soft(np.hypot(px - side * 0.36, py / 1.7) - 0.33, 0.08) * np.where(side > 0, lungs[1], lungs[0])
    image -= 0.14 * np.minimum(collapse, 1.2) * edge * (py < 0.4)
    wires = hairs(rng, n, size, 2, 0.014) * column(rng.random(n) < 0.5 * case.clutter)
    image = image + 0.25 * wires + 0.02 * smooth_noise(rng, n, size, 0.012)
    return image[..., None].astype(np.float32), None


def _in_lung(rng: np.random.Generator, n: int, radius: float, irregularity: float) -> Outlines:
    """Blobs centred in one of the two lungs."""
    shape = draw_outlines(rng, n, radius * np.exp(rng.normal(0, 0.2, n)), np.full(n, irregularity), 0.0, elongation=1.4)
    side = rng.choice([-1.0, 1.0], n)
    return Outlines(
        uniform(rng, -0.45, 0.5, n),
        (side * rng.uniform(0.3, 0.58, n)).astype(np.float32),
        shape.radius,
        shape.elongation,
        shape.angle,
        shape.amplitude,
        shape.phase,
    )


def brain_slices(
    rng: np.random.Generator, cases: int, per_case: int, size: int, case: CaseMix
) -> tuple[np.ndarray, np.ndarray]:
    """`per_case` neighbouring slices of each case in three contrasts (CONTRASTS); a lesion grows and shrinks over the
    slices, some show none.

    The lesion is bright in FLAIR, slightly dark in T1, and has a bright rim and a dark core after contrast.
    """
    n = cases * per_case
    y, x = grid(size)
    slab = np.tile(np.linspace(-1, 1, per_case, dtype=np.float32) if per_case > 1 else np.zeros(1, np.float32), cases)

    def per(values: np.ndarray) -> np.ndarray:  # a number per case, repeated for its slices
        return np.repeat(np.asarray(values, np.float32), per_case)

    scale = column(per(uniform(rng, 0.86, 1.0, cases)) * (1 - 0.08 * (slab + 0.3) ** 2))
    turn = column(per(rng.normal(0, 0.08, cases)))
    px, py = (x + turn * y) / (0.82 * scale), (y - turn * x) / (0.98 * scale)
    rho = np.hypot(px, py)
    folds = smooth_noise(rng, cases, size, 0.028).repeat(per_case, axis=0)
    inner = soft(0.86 - rho, 0.06)
    cortex = np.clip(soft(rho + 0.07 * folds - 0.62, 0.12), 0, 1)
    open_wide = column(per(uniform(rng, 0.6, 1.3, cases)))
    horn = (
        np.abs(px) - 0.07 - 0.22 * py**2 / open_wide - 0.06 * np.abs(py)
    )  # two horns that part towards front and back
    ventricle = soft(1 - np.hypot(horn / (0.075 * open_wide), (py + 0.02) / (0.36 * open_wide)), 0.6)
    skull = np.exp(-(((rho - 0.97) / 0.035) ** 2))
    white, grey = np.array([0.62, 0.42, 0.6], np.float32), np.array([0.42, 0.55, 0.42], np.float32)
    image = np.broadcast_to(white, (n, size, size, 3)).copy()
    image = mix(image, grey, cortex)
    image = mix(image, np.array([0.16, 0.12, 0.16], np.float32), ventricle)
    sulci = np.exp(-((folds / 0.28) ** 2)) * soft(rho - 0.55, 0.2)
    image = mix(image, np.array([0.18, 0.14, 0.2], np.float32), 0.75 * sulci)
    veins = spots(rng, n, size, 5, 0.03, 0.05) * soft(0.8 - rho, 0.1)
    image[..., 2] += 0.3 * veins
    caps = spots(rng, n, size, 3, 0.05, 0.12) * column(rng.random(n) < case.clutter) * soft(0.75 - rho, 0.1)
    image[..., 1] += 0.16 * caps
    image, mask = _tumour(rng, image, rho, cases, per_case, size, case)
    image = image * inner[..., None] + 0.75 * skull[..., None] * np.array([0.9, 0.5, 0.9], np.float32)
    bias = 1 + 0.12 * smooth_noise(rng, cases, size, 0.3).repeat(per_case, axis=0)
    image = image * bias[..., None] + 0.02 * smooth_noise(rng, n, size, 0.0)[..., None]
    return np.clip(image, 0, None).astype(np.float32), mask


def _tumour(
    rng: np.random.Generator, image: np.ndarray, rho: np.ndarray, cases: int, per_case: int, size: int, case: CaseMix
) -> tuple[np.ndarray, np.ndarray]:
    slab = np.linspace(-1, 1, per_case) if per_case > 1 else np.zeros(1)
    radius = np.clip(0.6 * case.radius * np.exp(rng.normal(0, 0.3, cases)), 0.1, 0.42).astype(np.float32)
    shape = draw_outlines(rng, cases, radius, uniform(rng, 0.05, 0.16, cases), 0.5)
    reach = 1 - ((slab[None] - rng.uniform(-0.5, 0.5, (cases, 1))) / rng.uniform(0.7, 1.3, (cases, 1))) ** 2
    grown = (radius[:, None] * np.sqrt(np.clip(reach, 0, 1))).reshape(-1)
    names = ("y", "x", "elongation", "angle", "amplitude", "phase")
    repeated = {name: np.repeat(getattr(shape, name), per_case, axis=0) for name in names}
    inside = depth(Outlines(radius=grown, **repeated), size)
    inside = np.where(rho < 0.84, inside, np.minimum(inside, -0.02))
    inside = np.where(column(grown) > 0.05, inside, -1.0)
    fuzz = np.repeat(uniform(rng, 0.06, 0.22, cases), per_case)
    body = soft(inside, fuzz)
    strength = np.repeat(np.maximum(case.contrast * uniform(rng, 0.6, 1.15, cases), 0.55), per_case)
    uneven = 1 + 0.2 * smooth_noise(rng, len(image), size, 0.06)
    bright = 0.8 * np.clip(column(strength) * body * uneven, 0, 1)  # covers ventricles as well
    image[..., 1] += (0.85 - image[..., 1]) * bright
    image[..., 0] -= 0.14 * column(strength) * body
    image[..., 2] -= 0.12 * column(strength) * body
    enhancing = np.repeat(uniform(rng, 0, 0.45, cases), per_case)
    image[..., 2] += column(enhancing) * rim(inside - 0.08, 0.05) * soft(inside, 0.05)
    return image, (inside > 0).astype(np.uint8)
