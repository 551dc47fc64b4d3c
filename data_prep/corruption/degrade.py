"""Pure degradations of one stored image: noise, blur, motion, contrast, JPEG-like blocks, lost resolution.

Letters: H W pixels, C channels, x image on the 0..1 scale, s severity 1..5. An image is (H, W) or (H, W, C) of any
dtype a site file may hold; what comes back has its shape and dtype. Integers are taken on 0..1 by the largest value of
their type. Floats have no such value: each channel is taken on the range it has in the image, from its smallest to its
largest finite pixel, so a channel without a range stays as it is. The result is clipped to that range; pixels that are
not finite stay. All channels are treated alike.
Gaussian noise at c is that of FedISM (IJCAI 2024, arXiv 2404.17805); the other constants follow the corruption
benchmark of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261) where it has the same kind.
Our choices: lengths in pixels are meant for images of 224 pixels and shrink with the longer side; the motion kernel is
symmetric, so that content stays where its annotation is (a trail to one side would move it); JPEG blocks keep 8 pixels
and treat each channel with the luminance table (no colour transform); lost resolution is interpolated back linearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage, special

from data_prep.resize import overlap
from data_prep.seeding import Rng
from fedmed.config import nearest

REFERENCE_SIDE = 224  # pixels a side for which blur lengths are given, FedISM
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # c on the 0..1 scale, official code of FedISM
BLUR_STD = (1.0, 2.0, 3.0, 4.0, 6.0)  # sigma, pixels of 224, corruption benchmark
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # (radius, sigma), pixels of 224, official code of FedISM
MOTION_ANGLE = 45.0  # the direction is U(-45, 45) degrees off the horizontal, official code of FedISM
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # share of the contrast that is left, corruption benchmark
JPEG_QUALITY = (25, 18, 15, 10, 7)  # corruption benchmark
RESOLUTION = (0.6, 0.5, 0.4, 0.3, 0.25)  # share of the side length that is left, corruption benchmark
BLOCK = 8  # pixels a side of a JPEG block
LUMINANCE = np.array(  # quantisation at quality 50, ITU-T T.81 annex K
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


def gaussian_noise(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """x + N(0, c^2), drawn for every pixel and channel. In, out: (H, W, C) float64; not clipped."""
    noisy: np.ndarray = x + rng.normal(scale=NOISE_STD[severity - 1], size=x.shape)
    return noisy


def gaussian_kernel(sigma: float) -> np.ndarray:
    """Discrete Gaussian of variance sigma^2: weights exp(-t) I_n(t), t = sigma^2, I_n the modified Bessel functions.

    sigma > 0 in pixels. Out: (R,) float64, R odd, sum 1. A sampled Gaussian would do nothing below half a pixel, which
    is where small images are.
    """
    reach = math.ceil(4 * sigma) + 1
    weights = special.ive(np.abs(np.arange(-reach, reach + 1)), sigma**2)
    normalised: np.ndarray = weights / weights.sum()
    return normalised


def gaussian_blur(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """x smoothed by a Gaussian of sigma * side / 224 pixels, edges repeated. In, out: (H, W, C) float64."""
    kernel = gaussian_kernel(BLUR_STD[severity - 1] * _pixel_scale(x))
    for axis in (0, 1):
        x = ndimage.correlate1d(x, kernel, axis=axis, mode="nearest")
    return x


def motion_kernel(radius: float, sigma: float, angle: float) -> np.ndarray:
    """Line through the centre with weights exp(-t^2 / (2 sigma^2)), |t| <= radius: (R, R) float64, R odd, sum 1.

    radius >= 0 and sigma > 0 in pixels, angle in degrees from the horizontal. Points of the line, at most 1/8 pixel
    apart, are shared among the four pixels around them.
    """
    reach = math.ceil(radius)
    steps = np.linspace(-radius, radius, 2 * math.ceil(8 * radius) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))  # one pixel more each way: the neighbours of the ends
    rows = reach + 1 + steps * math.sin(math.radians(angle))
    columns = reach + 1 + steps * math.cos(math.radians(angle))
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (1 - np.abs(rows - top - down)) * (1 - np.abs(columns - left - right))
        inside = share > 0  # an end on the border has no neighbour beyond it, nor a share for one
        np.add.at(kernel, (top[inside] + down, left[inside] + right), (weights * share)[inside])
    normalised: np.ndarray = kernel / kernel.sum()
    return normalised


def motion_blur(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """x smeared along a line of random direction, edges repeated. In, out: (H, W, C) float64. One draw: the angle."""
    radius, sigma = (length * _pixel_scale(x) for length in MOTION[severity - 1])
    kernel = motion_kernel(radius, sigma, float(rng.uniform(-MOTION_ANGLE, MOTION_ANGLE)))
    smeared: np.ndarray = ndimage.correlate(x, kernel[:, :, None], mode="nearest")
    return smeared


def contrast(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """Mean of each channel plus a share of the difference from it. In, out: (H, W, C) float64."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    flat: np.ndarray = mean + CONTRAST[severity - 1] * (x - mean)
    return flat


def quantisation(quality: int) -> np.ndarray:
    """Quantisation steps of the 8 x 8 coefficients for a quality 1..100: (8, 8) float64, 1..255 on the 0..255 scale."""
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps: np.ndarray = np.clip(np.floor((LUMINANCE * percent + 50) / 100), 1, 255)
    return steps


def jpeg(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """Cosine coefficients of 8 x 8 blocks rounded to their steps. In, out: (H, W, C) float64; edges repeated to fill
    the last blocks."""
    height, width, channels = x.shape
    padded = np.pad(x, ((0, -height % BLOCK), (0, -width % BLOCK), (0, 0)), mode="edge")
    blocks = (padded * 255.0 - 128.0).reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK, channels)
    steps = quantisation(JPEG_QUALITY[severity - 1])[:, None, :, None]
    coefficients = np.rint(fft.dctn(blocks, axes=(1, 3), norm="ortho") / steps) * steps
    restored = (fft.idctn(coefficients, axes=(1, 3), norm="ortho") + 128.0) / 255.0
    cropped: np.ndarray = restored.reshape(padded.shape)[:height, :width]
    return cropped


def resampling(size: int, new_size: int) -> np.ndarray:
    """Area mean to `new_size` cells and linear interpolation back, along one axis: (size, size) float64, rows sum to 1."""
    centres = (np.arange(size) + 0.5) * new_size / size - 0.5
    cells = np.arange(new_size)
    back = np.stack([np.interp(centres, cells, unit) for unit in np.eye(new_size)], axis=1)
    matrix: np.ndarray = back @ overlap(size, new_size)
    return matrix


def resolution(x: np.ndarray, severity: int, rng: Rng) -> np.ndarray:
    """x on a coarser grid (at least one cell a side) and back. In, out: (H, W, C) float64."""
    rows, columns = (resampling(n, max(1, round(RESOLUTION[severity - 1] * n))) for n in x.shape[:2])
    coarse: np.ndarray = np.einsum("ph,hwc,qw->pqc", rows, x, columns, optimize=True)
    return coarse


@dataclass(frozen=True)
class Kind:
    """A degradation of the 0..1 scale, and whether integers are truncated (published for noise) or rounded."""

    apply: Callable[[np.ndarray, int, Rng], np.ndarray]
    truncates: bool = False


KINDS: dict[str, Kind] = {
    "gaussian_noise": Kind(gaussian_noise, truncates=True),
    "gaussian_blur": Kind(gaussian_blur),
    "motion_blur": Kind(motion_blur),
    "contrast": Kind(contrast),
    "jpeg": Kind(jpeg),
    "resolution": Kind(resolution),
}


def degrade(image: np.ndarray, kind: str, severity: int, rng: Rng) -> np.ndarray:
    """A degraded copy of an image.

    In: image (H, W) or (H, W, C), uint8, uint16 or float; kind a key of `KINDS`; severity 1..5. Out: shape and dtype of
    `image`, clipped to the range of its type (floats: of each channel). Only gaussian_noise and motion_blur draw from
    `rng`. ValueError for another kind or severity.
    """
    check(kind, severity)
    if not image.size:
        return image.copy()
    planes = image.reshape(*image.shape[:2], -1)
    low, span = value_range(planes)
    finite = np.isfinite(planes)
    unit = _on_unit(np.where(finite, planes, low), low, span)
    result = np.clip(KINDS[kind].apply(unit, severity, rng), 0.0, 1.0) * span + low
    if np.issubdtype(image.dtype, np.integer) and not KINDS[kind].truncates:
        result = np.rint(result)
    stored: np.ndarray = np.where(finite & (span > 0), result.astype(image.dtype), planes).reshape(image.shape)
    return stored


def check(kind: str, severity: int) -> None:
    """ValueError unless `kind` is known and `severity` is 1..5."""
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {', '.join(KINDS)}, got {kind!r}{nearest(kind, KINDS)}")
    if not 1 <= severity <= len(NOISE_STD):
        raise ValueError(f"expected a severity of 1..{len(NOISE_STD)}, got {severity}")


def value_range(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest value and span of the scale of an image (H, W, C): two arrays (C,) float64; floats: see the header."""
    channels = planes.shape[2]
    if np.issubdtype(planes.dtype, np.integer):
        return np.zeros(channels), np.full(channels, float(np.iinfo(planes.dtype).max))
    finite = np.isfinite(planes)
    some = finite.any(axis=(0, 1))
    low, high = (
        np.where(some, pick(np.where(finite, planes, worst), axis=(0, 1)), 0.0).astype(np.float64)
        for pick, worst in ((np.min, np.inf), (np.max, -np.inf))
    )
    return low, high - low


def mean_abs_error(clean: np.ndarray, degraded: np.ndarray) -> float:
    """Mean |degraded - clean| on the 0..1 scale of the clean image, over finite pixels; 0 when there are none."""
    if not clean.size:
        return 0.0
    planes = clean.reshape(*clean.shape[:2], -1)
    low, span = value_range(planes)
    finite = np.isfinite(planes)
    both = (np.where(finite, image.reshape(planes.shape), low) for image in (clean, degraded))
    first, second = (_on_unit(image, low, span) for image in both)
    return float(np.abs(second - first).sum() / max(int(finite.sum()), 1))


def _on_unit(planes: np.ndarray, low: np.ndarray, span: np.ndarray) -> np.ndarray:
    """(planes - low) / span in float64; 0 in a channel without a range."""
    unit: np.ndarray = (planes - low) / np.where(span > 0, span, 1.0)
    return unit


def _pixel_scale(x: np.ndarray) -> float:
    return max(x.shape[:2]) / REFERENCE_SIDE
