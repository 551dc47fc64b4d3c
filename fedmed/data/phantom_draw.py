"""Drawing with arrays: noise fields, irregular blobs, lines and blurs for whole batches of synthetic images.

Letters: n images, S side in pixels, K harmonics. All results are float32; coordinates run from -1 to 1 over the image,
y downwards. Every random number comes from the generator handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HARMONICS = (2, 3, 4, 5, 7)  # angular frequencies of an outline


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (y, x), each (S, S), in -1..1."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    return np.meshgrid(axis, axis, indexing="ij")[0], np.meshgrid(axis, axis, indexing="ij")[1]


def column(values: np.ndarray | float) -> np.ndarray:
    """Numbers per image (n,) as (n, 1, 1)."""
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)


def uniform(rng: np.random.Generator, low: float, high: float, n: int) -> np.ndarray:
    """Uniform numbers (n,) float32."""
    return rng.uniform(low, high, n).astype(np.float32)


def smooth_noise(rng: np.random.Generator, n: int, size: int, scale: float) -> np.ndarray:
    """Gaussian noise fields (n, S, S) of unit variance, correlated over about `scale` (a fraction of the image side; 0:
    white).
    """
    white = rng.standard_normal((n, size, size), dtype=np.float32)
    if scale <= 0:
        return white
    rows = np.fft.fftfreq(size).astype(np.float32)[:, None]
    columns = np.fft.rfftfreq(size).astype(np.float32)
    sigma = scale * size
    gain = np.exp(-2.0 * np.pi**2 * sigma**2 * (rows**2 + columns**2)).astype(np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(size, size)).astype(np.float32)
    field -= field.mean(axis=(1, 2), keepdims=True)
    return field / np.maximum(field.std(axis=(1, 2), keepdims=True), 1e-6)


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of images (n, S, S, C) with `sigma` in pixels; the border is repeated. sigma 0: unchanged."""
    radius = int(np.ceil(2.5 * sigma))
    if radius == 0:
        return images
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        length = images.shape[axis]
        source = [np.clip(np.arange(length) + offset, 0, length - 1) for offset in offsets]
        images = sum(weight * images.take(rows, axis=axis) for weight, rows in zip(weights, source, strict=True))
    return images


@dataclass(frozen=True)
class Outlines:
    """Irregular outlines of n blobs: centre y, x, mean radius, elongation (1: round), angle, harmonics' amplitudes and
    phases (n, K).
    """

    y: np.ndarray
    x: np.ndarray
    radius: np.ndarray
    elongation: np.ndarray
    angle: np.ndarray
    amplitude: np.ndarray
    phase: np.ndarray


def draw_outlines(
    rng: np.random.Generator,
    n: int,
    radius: np.ndarray,
    irregularity: np.ndarray,
    spread: float,
    elongation: float = 1.6,
) -> Outlines:
    """Draw n outlines of the given mean radii (n,) (image half sides); centres within +-spread, `irregularity` (n,): sd
    of the outline / radius.
    """
    decay = np.array([1.0 / order for order in HARMONICS], dtype=np.float32)
    decay /= np.sqrt((decay**2).sum() / 2)
    amplitude = (
        rng.rayleigh(0.8, (n, len(HARMONICS))).astype(np.float32)
        * decay
        * np.asarray(irregularity, np.float32)[:, None]
    )
    room = np.maximum(0.05, spread - 0.5 * radius)
    return Outlines(
        y=uniform(rng, -1, 1, n) * room,
        x=uniform(rng, -1, 1, n) * room,
        radius=np.asarray(radius, np.float32),
        elongation=uniform(rng, 1.0, elongation, n),
        angle=uniform(rng, 0, np.pi, n),
        amplitude=np.clip(amplitude, 0, 0.45),
        phase=rng.uniform(0, 2 * np.pi, (n, len(HARMONICS))).astype(np.float32),
    )


def depth(outlines: Outlines, size: int) -> np.ndarray:
    """How far inside its outline each pixel lies, (n, S, S): about a signed distance in image half sides, positive
    inside.
    """
    y, x = grid(size)
    dy, dx = y - column(outlines.y), x - column(outlines.x)
    cos, sin = column(np.cos(outlines.angle)), column(np.sin(outlines.angle))
    stretch = column(np.sqrt(outlines.elongation))
    along, across = (cos * dx + sin * dy) / stretch, (cos * dy - sin * dx) * stretch
    theta = np.arctan2(across, along)
    radius = np.ones_like(theta)
    for k, order in enumerate(HARMONICS):
        radius += column(outlines.amplitude[:, k]) * np.cos(order * theta + column(outlines.phase[:, k]))
    return column(outlines.radius) * np.maximum(radius, 0.15) - np.hypot(along, across)


def soft(distance: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Smooth step 0..1 over about `width` around zero (a logistic curve); width (n,) or a number, > 0."""
    scaled = distance / column(width)
    return 1.0 / (1.0 + np.exp(-4.0 * np.clip(scaled, -6, 6)))


def hairs(rng: np.random.Generator, n: int, size: int, at_most: int, width: float) -> np.ndarray:
    """Opacity 0..1 of thin curved lines, (n, S, S), 0 to `at_most` of them per image, `width` in image half sides."""
    y, x = grid(size)
    cover = np.zeros((n, size, size), dtype=np.float32)
    number = rng.integers(0, at_most + 1, n)
    for line in range(at_most):
        angle, offset = uniform(rng, 0, np.pi, n), uniform(rng, -0.9, 0.9, n)
        bend, start = uniform(rng, -0.5, 0.5, n), uniform(rng, -1.2, 0.3, n)
        length, thick = uniform(rng, 0.6, 1.8, n), width * uniform(rng, 0.6, 1.4, n)
        cos, sin = column(np.cos(angle)), column(np.sin(angle))
        along, across = cos * x + sin * y, cos * y - sin * x
        distance = np.abs(across - column(offset) - column(bend) * along**2) / np.sqrt(
            1 + (2 * column(bend) * along) ** 2
        )
        inside = (along > column(start)) & (along < column(start + length)) & column(number > line).astype(bool)
        cover = np.maximum(cover, np.exp(-((distance / column(thick)) ** 2)) * inside)
    return cover


def spots(rng: np.random.Generator, n: int, size: int, at_most: int, low: float, high: float) -> np.ndarray:
    """Opacity 0..1 of small soft discs, (n, S, S), 0 to `at_most` per image, radii between `low` and `high` (image half
    sides).
    """
    y, x = grid(size)
    cover = np.zeros((n, size, size), dtype=np.float32)
    number = rng.integers(0, at_most + 1, n)
    for spot in range(at_most):
        radius = uniform(rng, low, high, n)
        squared = (y - column(uniform(rng, -1, 1, n))) ** 2 + (x - column(uniform(rng, -1, 1, n))) ** 2
        cover = np.maximum(cover, np.exp(-((squared / column(radius) ** 2) ** 2)) * column(number > spot))
    return cover


def mix(image: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lay `colour` over images (n,S,S,C) with opacity `alpha` (n,S,S); colour (C,), (n,C) or (n,S,S,C)."""
    colour = np.asarray(colour, dtype=np.float32)
    if colour.ndim == 2:
        colour = colour[:, None, None, :]
    return image + (colour - image) * alpha[..., None]


def rim(outline_depth: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Opacity 0..1 of the boundary zone of a blob, (n,S,S)."""
    return np.exp(-((outline_depth / column(width)) ** 2))
