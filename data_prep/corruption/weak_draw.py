"""Geometry of weak labels: components of a mask, points inside them, lines along their middle, rectangles.

Letters: mask (H, W) integer class ids, 0 background, 1..C-1 objects, from C on not annotated; region (H, W) bool. A
component is an 8-connected region of one class. Places are (row, column). Published code has none of these rules: they
and their sizes are our choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra, minimum_spanning_tree

from data_prep.seeding import Rng

SMALL = 5  # pixels; a smaller component is marked by its most interior pixel alone
EDGE = 0.2  # of the largest inner distance, kept free at the outline of an object before it is thinned
AWAY = 0.1  # of the shorter side, between background points and the nearest object
_EIGHT = np.ones((3, 3), dtype=bool)
_RING = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from the north
_Box = tuple[slice, slice]


def components(mask: np.ndarray, num_classes: int) -> Iterator[tuple[int, _Box, np.ndarray]]:
    """Class, frame and region (bool, of the frame's shape) of each component of an object, by class."""
    for label in range(1, num_classes):
        regions, _ = ndimage.label(mask == label, _EIGHT)
        for number, frame in enumerate(ndimage.find_objects(regions), start=1):
            yield label, frame, regions[frame] == number


def inner_distance(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest one outside the region, (H, W) float64; beyond the image is outside."""
    distance: np.ndarray = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    return distance


def interior_pixel(region: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel deepest inside a region that has one; the first in reading order of equals."""
    row, column = np.unravel_index(int(np.argmax(inner_distance(region))), region.shape)
    return int(row), int(column)


def disc(centre: tuple[int, int], radius: float, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels within `radius` of a pixel, (H, W) bool; radius 0: the pixel."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    inside: np.ndarray = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
    return inside


def background_places(mask: np.ndarray, count: int, rng: Rng) -> np.ndarray:
    """Up to `count` different background pixels away from the objects, drawn evenly: (n, 2) rows and columns.

    Away is `AWAY` of the shorter side; where nothing is, the one background pixel farthest from the objects; without
    objects, anywhere. No background: none.
    """
    free = mask == 0
    far = free
    if free.any() and not free.all():
        distance = ndimage.distance_transform_edt(free)
        far = free & (distance >= AWAY * min(mask.shape))
        if not far.any():
            far = np.zeros_like(free)
            far.flat[int(distance.argmax())] = True
    places = np.argwhere(far)
    return places[rng.permutation(len(places))[:count]]


def _thinning_tables() -> np.ndarray:
    """Which of the 256 neighbourhoods lose their centre, (2, 256) bool: the two passes of Guo and Hall (1989)."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    north, ne, east, se, south, sw, west, nw = bits.T.astype(bool)
    crossings = (~north & (ne | east)).astype(int) + (~east & (se | south)) + (~south & (sw | west))
    crossings = crossings + (~west & (nw | north))
    first = (nw | north).astype(int) + (ne | east) + (se | south) + (sw | west)
    second = (north | ne).astype(int) + (east | se) + (south | sw) + (west | nw)
    fewest = np.minimum(first, second)
    common = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    return np.stack([common & ~((south | sw | ~nw) & west), common & ~((north | ne | ~se) & east)])


_TABLES = _thinning_tables()


def thin(region: np.ndarray) -> np.ndarray:
    """Skeleton of a region one pixel wide, (H, W) bool; a part of it, connected as it is."""
    line = np.pad(region, 1).astype(np.uint8)
    height, width = region.shape
    inner = line[1:-1, 1:-1]
    changed = True
    while changed:
        changed = False
        for table in _TABLES:
            code = np.zeros(region.shape, dtype=np.uint8)
            for bit, (row, column) in enumerate(_RING):
                code |= line[1 + row : 1 + row + height, 1 + column : 1 + column + width] << bit
            gone = (inner != 0) & table[code]
            inner[gone] = 0
            changed |= bool(gone.any())
    return inner.astype(bool)


def longest_path(line: np.ndarray) -> np.ndarray:
    """Pixels (n, 2) along the longest path of a thin connected line, in order. A closed curve is followed all round.

    The line's shortest spanning tree has no cycles; its two ends farthest apart are found by two sweeps.
    """
    places = np.argwhere(line)
    index = np.full(np.add(line.shape, 2), -1)
    index[1:-1, 1:-1][line] = np.arange(len(places))
    starts, ends, lengths = [], [], []
    for row, column in _RING[1:5]:  # half of the neighbours: each pair once
        other = index[places[:, 0] + 1 + row, places[:, 1] + 1 + column]
        starts.append(np.flatnonzero(other >= 0))
        ends.append(other[other >= 0])
        lengths.append(np.full(len(ends[-1]), np.hypot(row, column)))
    edges = (np.concatenate(lengths), (np.concatenate(starts), np.concatenate(ends)))
    tree = minimum_spanning_tree(coo_array(edges, shape=(len(places), len(places))).tocsr())
    start = int(np.argmax(_reach(dijkstra(tree, directed=False, indices=0))))
    distance, before = dijkstra(tree, directed=False, indices=start, return_predecessors=True)
    here = int(np.argmax(_reach(distance)))
    path = [here]
    while here != start:
        here = int(before[here])
        path.append(here)
    return places[path]


def _reach(distance: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(distance), distance, -1.0)


def _largest(region: np.ndarray) -> np.ndarray:
    """The largest 8-connected part of a region, the first of equals."""
    parts, count = ndimage.label(region, _EIGHT)
    return region if count <= 1 else parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))


def centre_line(region: np.ndarray) -> np.ndarray:
    """Pixels (n, 2), n >= 1, along the middle of a component that is not empty.

    A round one has no long middle (n below its width): there, a closed curve half-way from its outline.
    """
    if region.sum() < SMALL:
        return np.array([interior_pixel(region)])
    inside = inner_distance(region)
    deepest = float(inside.max())
    line = longest_path(thin(_largest(inside > EDGE * deepest)))
    return line if len(line) >= 2 * deepest else _half_way(inside)


def background_line(mask: np.ndarray) -> np.ndarray:
    """Pixels (n, 2) of a curve around the objects, half-way to the farthest background pixel; no background: n = 0.

    Without objects: a curve half-way between the border of the image and its middle.
    """
    free = mask == 0
    if not free.any():
        return np.empty((0, 2), dtype=np.int64)
    return _half_way(inner_distance(free) if free.all() else ndimage.distance_transform_edt(free))


def _half_way(distance: np.ndarray) -> np.ndarray:
    """Pixels (n, 2) of the longest line where a distance (0: outside) is about half its largest value."""
    band = (distance > 0) & (np.abs(distance - distance.max() / 2) <= 1.0)  # a step changes it by 1.5 at most: no gap
    return longest_path(thin(_largest(band)))


def shaken(path: np.ndarray, most: float, rng: Rng, sigma: float = 10.0) -> np.ndarray:
    """A path displaced by a smooth random curve of at most `most` pixels, (n, 2) rounded; sigma in pixels of the path."""
    curve = ndimage.gaussian_filter1d(rng.normal(size=path.shape), sigma, axis=0, mode="nearest")
    largest = float(np.hypot(curve[:, 0], curve[:, 1]).max(initial=0.0))
    moved: np.ndarray = np.rint(path + (most / largest if largest else 0.0) * curve).astype(np.int64)
    return moved


def largest_rectangle(region: np.ndarray) -> _Box:
    """The largest axis-aligned rectangle of set pixels, as slices of rows and columns; the first found of equals.

    Row by row, over the number of set pixels above each column. An empty region: empty slices.
    """
    height, width = region.shape
    best, found = 0, (slice(0, 0), slice(0, 0))
    above = np.zeros(width + 1, dtype=np.int64)  # one column more, of height 0, closes all that is open
    for row in range(height):
        above[:width] = np.where(region[row], above[:width] + 1, 0)
        opened: list[tuple[int, int]] = []  # (first column, height), heights ascending
        for column, tall in enumerate(above.tolist()):
            left = column
            while opened and opened[-1][1] >= tall:
                left, size = opened.pop()
                if size * (column - left) > best:
                    best = size * (column - left)
                    found = (slice(row + 1 - size, row + 1), slice(left, column))
            opened.append((left, tall))
    return found


def shrunk(rectangle: _Box, share: float) -> _Box:
    """A rectangle shrunk about its centre to `share` of each side, at least one pixel."""
    sides = []
    for side in rectangle:
        length = side.stop - side.start
        kept = max(1, round(share * length))
        first = side.start + (length - kept) // 2
        sides.append(slice(first, first + kept))
    return sides[0], sides[1]


def box_around(region: np.ndarray, margins: tuple[int, int, int, int] = (0, 1, 0, 1)) -> _Box:
    """Rows [min - m0, max + m1) and columns [min - m2, max + m3) of a region, clamped to the image.

    The end is exclusive, as in FedMix: margins (0, 1, 0, 1) give the tight box. An empty region: empty slices.
    """
    if not region.any():
        return slice(0, 0), slice(0, 0)
    sides = []
    for axis, (before, after) in enumerate((margins[:2], margins[2:])):
        places = np.flatnonzero(region.any(axis=1 - axis))
        first = max(0, int(places[0]) - before)
        sides.append(slice(first, max(first, min(region.shape[axis], int(places[-1]) + after))))
    return sides[0], sides[1]
