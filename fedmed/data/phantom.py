"""Embedded synthetic data: multi-site files of images that pose the problems of medical ones, from a seed, without any
download.

Each site has its own appearance (colour cast, contrast, gamma, blur, noise, vignette) and its own case mix (lesion
sizes, class shares, clutter, missing contrasts). Site k of a seed is the same whatever the number of sites: its
generators are derived from (seed, k, purpose).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmed.config import nearest
from fedmed.data import phantom_scenes as scenes
from fedmed.data.phantom_draw import blur, grid
from fedmed.data.writer import SiteArrays, write_site_file
from fedmed.errors import UserError

PHANTOM_KINDS = ("segmentation", "classification", "multilabel", "multimodal")
PHANTOM_VERSION = 2  # raise when the same arguments give other pixels
SLICES = 4  # neighbouring slices of a multimodal case
BLOCK = 64  # images drawn at once (a multiple of SLICES)
FOLDS = ("train", "train", "test", "train", "train", "val", "train", "train", "test", "train")  # 70/10/20
PREVALENCE = np.array([0.3, 0.2, 0.25, 0.25, 0.2, 0.12])  # of the chest findings
_PURPOSES = ("style", "cases", "pixels", "splits")


@dataclass(frozen=True)
class Style:
    """Appearance of a site: colour factors (C,), gain, gamma, blur in pixels at side 64, noise sd, vignette depth 0..1
    at the corners.
    """

    cast: np.ndarray
    gain: float
    gamma: float
    blur: float
    noise: float
    vignette: float


def make_phantom(
    path: str | Path,
    kind: str,
    num_sites: int = 4,
    images_per_site: int | Sequence[int] = 150,
    image_size: int = 64,
    seed: int = 0,
    channels: int | None = None,
    lesions: int = 1,
    site_shift: float = 1.0,
    case_mix: float = 1.0,
    difficulty: float = 1.0,
    tail: float = 0.62,
    missing_contrasts: bool = True,
) -> Path:
    """Write a site file of synthetic images and return its path; the same arguments give the same file content.

    kind: segmentation (binary lesion masks; RGB skin, or with channels=1 ultrasound), classification (six skin findings
    with a long tail), multilabel (six chest findings that co-occur, grey) or multimodal (three MR contrasts, lesion
    masks, `modality_present`; slices of a case share a `group_id`). Splits are 70/10/20, case-wise.

    images_per_site: one number or one per site; lesions: segmentation only, at most so many per image; site_shift:
    strength of appearance differences between sites (0: none); case_mix: strength of case-mix differences (0: none);
    difficulty: overlap of the classes (classification); tail: share of class c+1 relative to class c, in (0, 1];
    missing_contrasts: multimodal only, whether some sites lack a contrast (stored as zeros, `modality_present` 0; FLAIR
    is always there and site 0, 3, 6, ... is complete). Raises UserError for unusable arguments.
    """
    options = _Options(kind, image_size, channels, lesions, site_shift, case_mix, difficulty, tail, missing_contrasts)
    counts = _check(options, num_sites, images_per_site, seed)
    sites = [_make_site(index, count, options, seed) for index, count in enumerate(counts)]
    meta = {
        "name": f"phantom_{kind}",
        "task": "segmentation" if kind == "multimodal" else kind,
        "classes": list(_CLASSES[kind]),
        "channels": options.channel_names,
        "image_size": [image_size, image_size],
        "modality": "synthetic",
        "source": f"fedmed phantom {PHANTOM_VERSION}, seed {seed}",
        "licence": "no restriction: generated images",
    }
    return write_site_file(path, meta, sites)


_CLASSES = {
    "segmentation": ("background", "lesion"),
    "classification": scenes.SKIN_CLASSES,
    "multilabel": scenes.CHEST_FINDINGS,
    "multimodal": ("background", "lesion"),
}


@dataclass(frozen=True)
class _Options:
    """Arguments of `make_phantom` that shape the images."""

    kind: str
    size: int
    channels: int | None
    lesions: int
    site_shift: float
    case_mix: float
    difficulty: float
    tail: float
    missing: bool

    @property
    def channel_names(self) -> list[str]:
        if self.kind == "multimodal":
            return list(scenes.CONTRASTS)
        return ["grey"] if self.kind == "multilabel" or self.channels == 1 else ["R", "G", "B"]


def _check(options: _Options, num_sites: int, images_per_site: int | Sequence[int], seed: int) -> list[int]:
    """Refuse unusable arguments with a UserError; return the number of images of each site."""
    kind = options.kind
    if kind not in PHANTOM_KINDS:
        raise UserError(f"No phantom {kind!r}{nearest(kind, PHANTOM_KINDS)}")
    counts = list(images_per_site) if isinstance(images_per_site, Sequence) else [images_per_site] * int(num_sites)
    for name, value, least in (
        ("num_sites", num_sites, 1),
        ("image_size", options.size, 16),
        ("lesions", options.lesions, 1),
        ("seed", seed, 0),
        *(("images_per_site", count, 10) for count in counts),  # 7 to train, 1 to validate, 2 to test
    ):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise UserError(f"data.phantom.{name} must be an integer of at least {least}, got {value!r}.")
    if len(counts) != num_sites:
        raise UserError(
            f"data.phantom.images_per_site lists {len(counts)} sites, num_sites is {num_sites}. Make them agree."
        )
    allowed = {"segmentation": (1, 3), "multilabel": (1,)}.get(kind, (3,))
    if options.channels is not None and options.channels not in allowed:
        number = " or ".join(map(str, allowed))
        raise UserError(f"data.phantom.channels for {kind} must be {number}, got {options.channels}.")
    if not 0 < options.tail <= 1 or min(options.site_shift, options.case_mix, options.difficulty) < 0:
        raise UserError(
            "data.phantom: need 0 < tail <= 1 and site_shift, case_mix, difficulty >= 0, got "
            f"tail={options.tail}, {options.site_shift}, {options.case_mix}, {options.difficulty}."
        )
    return [int(count) for count in counts]


def _draw_site(rng: np.random.Generator, options: _Options) -> tuple[Style, scenes.CaseMix, np.ndarray]:
    """Appearance, case mix and class factors (6,) of a site. Strength 0 gives every site the same."""
    shift, mix = options.site_shift, options.case_mix
    colour = options.channel_names == ["R", "G", "B"]
    number = 3 if colour or options.kind == "multimodal" else 1
    signed = rng.uniform(-1, 1, 3 + number)
    positive = rng.uniform(0, 1, 3)
    style = Style(
        cast=np.exp(shift * (0.13 if colour else 0.08) * signed[3:]).astype(np.float32),
        gain=float(np.exp(0.14 * shift * signed[0])),
        gamma=float(np.exp(0.3 * shift * signed[1])),
        blur=float(0.9 * shift * positive[0]),
        noise=float(0.012 + 0.03 * shift * positive[1] ** 2),
        vignette=float(np.clip(0.15 + 0.4 * shift * positive[2], 0, 0.8)),
    )
    own = rng.uniform(-1, 1, 3)
    case = scenes.CaseMix(
        radius=0.42 * float(np.exp(0.35 * mix * own[0])),
        contrast=float(np.exp(0.25 * mix * own[1])),
        clutter=float(np.clip(0.5 + 0.45 * mix * own[2], 0, 1)),
    )
    return style, case, np.exp(0.9 * mix * rng.standard_normal(6))


def _make_site(index: int, count: int, options: _Options, seed: int) -> SiteArrays:
    rngs = {
        name: np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(index, purpose)))
        for purpose, name in enumerate(_PURPOSES)
    }
    style, case, skew = _draw_site(rngs["style"], options)
    labels = _draw_labels(rngs["cases"], count, options, skew)
    images, masks = [], []
    for start in range(0, count, BLOCK):
        rows = slice(start, min(count, start + BLOCK))
        part = None if labels is None else labels[rows]
        image, mask = _paint(rngs["pixels"], rows.stop - rows.start, part, options, case)
        images.append(apply_style(image, style, rngs["pixels"]))
        masks.append(mask)
    pixels = np.concatenate(images)
    per_case = SLICES if options.kind == "multimodal" else 1
    group = np.arange(count) // per_case
    extras: dict[str, np.ndarray] = {}
    if options.kind == "multimodal":
        present = _present_contrasts(index if options.missing else 0, group)
        pixels *= present[:, None, None, :]
        extras = {"modality_present": present, "slice_no": (np.arange(count) % per_case).astype(np.int32)}
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    strata = labels if labels is not None and labels.ndim == 1 else np.zeros(count, dtype=np.int64)
    name = f"phantom-{index:02d}"
    return SiteArrays(
        name=name,
        image=pixels,
        annotations={"mask": np.concatenate([mask for mask in masks if mask is not None])}
        if labels is None
        else {"label": labels},
        splits=split_cases(rngs["splits"], group, strata),
        item_id=[f"{name}/{i:05d}" for i in range(count)],
        group_id=[f"{name}/case{g:05d}" for g in group],
        extras=extras,
        attrs={"natural_site": False},
    )


def _draw_labels(rng: np.random.Generator, count: int, options: _Options, skew: np.ndarray) -> np.ndarray | None:
    """Class of each image (n,) int64, findings (n,6) int64, or None for masks. Shares of the classes are met exactly,
    not only on average.
    """
    if options.kind == "classification":
        share = options.tail ** np.arange(len(scenes.SKIN_CLASSES)) * skew
        exact = count * share / share.sum()
        numbers = np.floor(exact).astype(int)
        numbers[np.argsort(numbers - exact, kind="stable")[: count - numbers.sum()]] += 1
        return rng.permutation(np.repeat(np.arange(len(numbers)), numbers)).astype(np.int64)
    if options.kind == "multilabel":
        odds = PREVALENCE / (1 - PREVALENCE) * skew
        illness = np.exp(rng.normal(0, 0.7, (count, 1)))  # the sick have several findings
        found = rng.random((count, 6)) < (odds * illness) / (1 + odds * illness)
        found[:, 2] |= found[:, 3] & (rng.random(count) < 0.35)  # wide hearts come with fluid
        return found.astype(np.int64)
    return None


def _paint(
    rng: np.random.Generator, count: int, labels: np.ndarray | None, options: _Options, case: scenes.CaseMix
) -> tuple[np.ndarray, np.ndarray | None]:
    if options.kind == "classification" and labels is not None:
        return scenes.skin_findings(rng, labels, options.size, case, options.difficulty)
    if options.kind == "multilabel" and labels is not None:
        return scenes.chest_films(rng, labels, options.size, case)
    if options.kind == "multimodal":
        cases = -(-count // SLICES)
        image, mask = scenes.brain_slices(rng, cases, SLICES, options.size, case)
        return image[:count], mask[:count]
    painter = scenes.ultrasound if options.channels == 1 else scenes.skin_lesions
    return painter(rng, count, options.size, case, options.lesions)


def apply_style(images: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    """Give images (n,S,S,C) in about 0..1 the look of a site: vignette, colour cast, gamma, blur, noise. Out: uint8."""
    size = images.shape[1]
    y, x = grid(size)
    shade = 1 - style.vignette * np.clip((y**2 + x**2) / 2, 0, 1) ** 1.5
    images = np.clip(images * shade[..., None] * (style.cast * style.gain), 0, 1) ** np.float32(style.gamma)
    images = blur(images, style.blur * size / 64)
    images = images + style.noise * rng.standard_normal(images.shape, dtype=np.float32)
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _present_contrasts(index: int, group: np.ndarray) -> np.ndarray:
    """Which contrasts each image has, (n, 3) uint8: site 1, 4, ... has no T1 contrast, in site 2, 5, ... every other
    case has no T1.
    """
    present = np.ones((len(group), 3), dtype=np.uint8)
    if index % 3 == 1:
        present[:, 2] = 0
    elif index % 3 == 2:
        present[group % 2 == 1, 0] = 0
    return present


def split_cases(rng: np.random.Generator, group: np.ndarray, strata: np.ndarray) -> dict[str, np.ndarray]:
    """Deal cases into train, val and test in the proportions 70/10/20, in turn within each class so that rare ones
    reach every split when they can.

    In: group (n,) case of each image; strata (n,) class of each image (of its case). Out: split -> sorted int32
    indices.
    """
    cases, first = np.unique(group, return_index=True)
    order = rng.permutation(len(cases))
    order = order[np.argsort(strata[first][order], kind="stable")]
    fold = np.empty(len(cases), dtype=object)
    fold[order] = [FOLDS[i % len(FOLDS)] for i in range(len(cases))]
    of_image = fold[np.searchsorted(cases, group)]
    return {name: np.flatnonzero(of_image == name).astype(np.int32) for name in ("train", "val", "test")}
