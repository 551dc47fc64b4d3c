"""Contour evolution noise of FedA3I (AAAI 2024, arXiv 2312.12838): outlines pushed outwards or inwards, per client.

Symbols: K num_clients, mu_k mean and sigma_k std of the offsets of client k (pixels; mu > 0 expansion), J segments,
D degree, w half_window, L border length, o(i) offset, c_i border pixel.
Departures from the published code: the redraw loop is bounded (the attempt with the smallest end gap is kept); objects
too small to follow give an empty mask (the code returns a pair or fails); an object without any background around it
stays as it is; each axis is clipped by its own size; several classes are evolved one by one, larger results below.
Options beyond the code: a lower bound for |mu|, a number of shrinkers, the clip, evenly spaced control points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from scipy import ndimage

from data_prep.corruption import Corrupted, TrainPool
from data_prep.geometry import border_normals, external_border, fill_polygon, mask_dice
from data_prep.seeding import Rng, Seed, integers
from fedmed.errors import UserError

END_WEIGHT = 10.0  # residual multiplier of the first and the closing control point
MAX_END_GAP = 3.0  # accepted |o(0) - o(L-1)|, pixels
MIN_EXTRA_AREA = 15  # smallest further object that is kept, pixels
SIDE_REACH = 5  # how far the side test looks, pixels


@dataclass(frozen=True)
class Evolution:
    """How an outline is moved."""

    segments: int = 30  # J, official code
    degree: int = 10  # D, official code; degree <= segments
    half_window: int = 20  # w, official code
    clip: float = 30.0  # pixels, official code
    even_spacing: bool = False  # False: s_j = j*floor(L/J) (official); True: s_j = j*L/J, no long last gap (our option)
    max_attempts: int = 1000  # our bound on the redraws


def client_noise_parameters(
    num_clients: int, mean_low: float, mean_high: float, std: float, num_shrinkers: int, rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the offsets of each client: (mu (K,), sigma (K,)) float64, pixels.

    Order of draws: mu ~ U(low, high); the shrinkers, without replacement, whose mu is negated; sigma ~ U(std/2, std).
    Official code: low 0, high 20, std 10, floor(0.2 K) shrinkers (type 1) or floor(0.8 K) (type 2).
    """
    if not 0 <= num_shrinkers <= num_clients or not 0 <= mean_low <= mean_high or std < 0:
        raise UserError(
            f"contour noise: need 0 <= shrinkers <= {num_clients}, 0 <= mean_low <= mean_high and std >= 0, got "
            f"{num_shrinkers}, {mean_low}, {mean_high}, {std}. Set data.corruption.args."
        )
    means = np.asarray(rng.uniform(mean_low, mean_high, size=num_clients))
    shrinkers = rng.choice(num_clients, size=num_shrinkers, replace=False)
    means[shrinkers] *= -1
    return means, np.asarray(rng.uniform(std / 2, std, size=num_clients))


def control_index(length: int, segments: int, even_spacing: bool = False) -> np.ndarray:
    """Control points s_j on a border of L pixels: (J,) integers j*floor(L/J), or floats j*L/J when even."""
    return np.arange(segments) * (length / segments if even_spacing else length // segments)


@lru_cache(maxsize=512)
def curve_operator(length: int, segments: int, degree: int, even_spacing: bool) -> np.ndarray:
    """Matrix (L, J) of the weighted least-squares fit: control offsets (J,) -> unclipped offset curve (L,), read-only.

    Control points at s_j = j*floor(L/J) (or j*L/J when even) and the closing point (L, o_0). The fit is linear in the
    offsets, so one matrix serves all redraws; a Chebyshev basis on [0, L] keeps it well conditioned. L >= J.
    """
    position = np.append(control_index(length, segments, even_spacing), length)
    weight = np.ones(segments + 1)
    weight[[0, -1]] = END_WEIGHT
    basis = np.polynomial.chebyshev.chebvander(2.0 * position / length - 1.0, degree)
    solve = np.linalg.pinv(basis * weight[:, None]) * weight[None, :]
    solve[:, 0] += solve[:, -1]  # the closing point carries o_0 too
    curve = np.polynomial.chebyshev.chebvander(2.0 * np.arange(length) / length - 1.0, degree)
    operator = curve @ solve[:, :-1]
    operator.setflags(write=False)
    return operator


def offset_curve(control_offsets: np.ndarray, length: int, settings: Evolution) -> tuple[np.ndarray, bool]:
    """Offset of every border pixel: o (L,) float64 in [-clip, clip], and whether its ends meet (gap below 3 pixels).

    In: control_offsets (J,) pixels, length L >= J.
    """
    operator = curve_operator(length, len(control_offsets), settings.degree, settings.even_spacing)
    offset = np.clip(operator @ control_offsets, -settings.clip, settings.clip)
    return offset, bool(abs(offset[0] - offset[-1]) < MAX_END_GAP)


def draw_offset_curve(length: int, mean: float, std: float, settings: Evolution, rng: Rng) -> np.ndarray:
    """Offset curve (L,) with control offsets ~ N(mean, std^2), redrawn until its ends meet.

    After `max_attempts` the attempt with the smallest gap is taken.
    """
    operator = curve_operator(length, settings.segments, settings.degree, settings.even_spacing)
    ends = operator[[0, -1]]
    best, best_gap = np.zeros(settings.segments), np.inf
    for _ in range(settings.max_attempts):
        control = rng.normal(mean, std, size=settings.segments)
        first, last = np.clip(ends @ control, -settings.clip, settings.clip)
        if abs(first - last) < best_gap:
            best, best_gap = control, abs(first - last)
        if best_gap < MAX_END_GAP:
            break
    return offset_curve(best, length, settings)[0]


def evolve_object(mask: np.ndarray, mean: float, std: float, rng: Rng, settings: Evolution) -> np.ndarray:
    """Move the outline of one object and fill the result.

    In: mask (H, W) bool, one connected object; mean, std pixels. Out: (H, W) bool, holes lost. Border shorter than J:
    empty. No background in the image: unchanged.
    """
    border = external_border(mask)
    length = len(border)
    if length < settings.segments:
        return np.zeros(mask.shape, dtype=bool)
    if mask.all():
        return mask.astype(bool)
    border = np.roll(border, -int(integers(rng, length)), axis=0)
    offset = draw_offset_curve(length, mean, std, settings, rng)
    if not offset.any():
        return mask.astype(bool)
    moved = move_border(mask, border, offset, border_normals(border, settings.half_window))
    return fill_polygon(moved, (mask.shape[0], mask.shape[1]))


def move_border(mask: np.ndarray, border: np.ndarray, offset: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Push each border pixel |o(i)| along its normal: towards background when o > 0, towards the object when o <= 0.

    In: mask (H, W), border (L, 2) int, offset (L,) pixels, normal (L, 2) unit. Out: (P, 2) int64, P <= L: pixels whose
    outward side is unclear within 5 pixels are dropped, so are those that end on the wrong side (still object with
    o > 1, background with o <= -1).
    """
    side = _outward_side(mask, border, normal)
    direction = np.where(offset > 0, side, -side)[:, None] * normal
    moved = _clip_to(mask, np.round(border + np.abs(offset)[:, None] * direction))
    inside = mask[moved[:, 0], moved[:, 1]] != 0
    keep = (side != 0) & ~(inside & (offset > 1)) & ~(~inside & (offset <= -1))
    kept: np.ndarray = moved[keep]
    return kept


def _outward_side(mask: np.ndarray, border: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(L,): +1 where +normal leads to background, -1 where -normal does, 0 where both sides look alike in 5 pixels."""
    side = np.zeros(len(border), dtype=np.int64)
    for reach in range(1, SIDE_REACH + 1):
        step = np.round(reach * normal)
        ahead, behind = _clip_to(mask, border + step), _clip_to(mask, border - step)
        object_ahead = mask[ahead[:, 0], ahead[:, 1]] != 0
        object_behind = mask[behind[:, 0], behind[:, 1]] != 0
        found = (side == 0) & (object_ahead != object_behind)
        side[found] = np.where(object_ahead[found], -1, 1)
    return side


def _clip_to(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    inside: np.ndarray = np.clip(points, 0, np.array(mask.shape) - 1).astype(np.int64)
    return inside


def contour_noise(mask: np.ndarray, mean: float, std: float, rng: Rng, settings: Evolution | None = None) -> np.ndarray:
    """Noisy version of one image's mask.

    In: mask (H, W) integer class ids, 0 background; mean, std pixels. Out: the same shape and dtype. Classes in
    ascending id; in each the 4-connected objects by decreasing area: the largest always, further ones from 15 pixels on
    (smaller ones vanish). Overlaps of classes go to the smaller result. No object: empty mask.
    """
    settings = settings or Evolution()
    evolved = []
    for label in np.unique(mask[mask != 0]):
        objects, _ = ndimage.label(mask == label)
        areas = np.bincount(objects.ravel())[1:]
        union = np.zeros(mask.shape, dtype=bool)
        for rank, index in enumerate(np.argsort(-areas, kind="stable")):
            if rank == 0 or areas[index] >= MIN_EXTRA_AREA:
                union |= evolve_object(objects == index + 1, mean, std, rng, settings)
        evolved.append((label, union))
    noisy = np.zeros_like(mask)
    for label, union in sorted(evolved, key=lambda item: -int(item[1].sum())):
        noisy[union] = label
    return noisy


@dataclass(frozen=True)
class ContourNoise:
    """`contour_noise`: parameters of the noise; segmentation files only.

    Lengths in pixels of the derived (resized) image. Defaults: the official code, type 1 (mostly expansion);
    shrink_fraction 0.8 is type 2.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    mean_low: float = 0.0  # lower bound of |mu|, 0 <= low <= high; 0 in the official code
    mean_high: float = 20.0  # upper bound of |mu|, official code
    std: float = 10.0  # sigma ~ U(std/2, std), official code
    shrink_fraction: float = 0.2  # floor(fraction*K) clients shrink, [0, 1], official code (type 1)
    num_shrinkers: int | None = None  # a number instead of the fraction, 0..K, our option
    segments: int = 30  # J, official code
    degree: int = 10  # D, official code
    half_window: int = 20  # w, official code
    clip: float = 30.0  # largest |offset|, official code
    even_spacing: bool = False  # evenly spaced control points, our option
    seed: int | None = None  # legacy seed of the client parameters; 0 in the official code; None: from the run's seed

    def __post_init__(self) -> None:
        if self.segments < 1 or not 0 <= self.degree <= self.segments or self.half_window < 1 or self.clip < 0:
            raise ValueError("need segments >= 1, 0 <= degree <= segments, half_window >= 1 and clip >= 0")
        if not 0.0 <= self.shrink_fraction <= 1.0:
            raise ValueError(f"need 0 <= shrink_fraction <= 1, got {self.shrink_fraction}")

    def apply(self, pool: TrainPool, seed: Seed) -> Corrupted:
        """Noisy masks of the pool; facts: mean_dice, noise_rate (1 - mean Dice), mu, sigma, direction, and
        is_noisy: a mean Dice below the mean over the sites."""
        shrinkers = self.num_shrinkers
        if shrinkers is None:
            shrinkers = int(self.shrink_fraction * pool.num_clients)
        parameters = seed.rng("contour_noise", self.seed)
        means, stds = client_noise_parameters(
            pool.num_clients, self.mean_low, self.mean_high, self.std, shrinkers, parameters
        )
        settings = Evolution(self.segments, self.degree, self.half_window, self.clip, self.even_spacing)
        base = seed if self.seed is None else Seed(self.seed)
        noisy = np.empty_like(pool.targets)
        facts = []
        for client in range(pool.num_clients):
            rng = base.rng(f"contour_noise/{client}")  # own stream: sites do not depend on each other
            mean, std = float(means[client]), float(stds[client])
            scores = []
            for item in np.flatnonzero(pool.client == client):
                noisy[item] = contour_noise(pool.targets[item], mean, std, rng, settings)
                scores.append(mask_dice(pool.targets[item], noisy[item]))
            dice = float(np.mean(scores)) if scores else 1.0
            facts.append(
                {
                    "noise_rate": 1.0 - dice,
                    "mean_dice": dice,
                    "mu": mean,
                    "sigma": std,
                    "direction": "expansion" if mean >= 0 else "shrinkage",
                }
            )
        # Every site is off a little here; the ones a method should trust less are those below the mean.
        rates = [float(f["noise_rate"]) for f in facts]
        average = float(np.mean(rates))
        return Corrupted(noisy, tuple({**f, "is_noisy": rate > average} for f, rate in zip(facts, rates, strict=True)))
