from __future__ import annotations

import numpy as np
import pytest

from data_prep.geometry import border_normals, external_border, fill_polygon, mask_dice


def disc(radius: float, size: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    return rows**2 + columns**2 <= radius**2


def test_border_of_a_square_by_hand():
    mask = np.zeros((5, 5), dtype=np.uint8)
    mask[1:4, 1:4] = 1
    # from the first pixel in reading order, down the left side first
    expected = [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (1, 2)]
    assert [tuple(point) for point in external_border(mask).tolist()] == expected


def test_border_of_points_and_lines():
    mask = np.zeros((3, 4), dtype=bool)
    assert external_border(mask).shape == (0, 2)
    mask[2, 3] = True
    assert external_border(mask).tolist() == [[2, 3]]
    mask[:] = False
    mask[1, :3] = True  # a line one pixel thick is walked on both sides
    assert external_border(mask).tolist() == [[1, 0], [1, 1], [1, 2], [1, 1]]
    mask[:] = False
    mask[0, 0] = mask[1, 1] = True
    assert external_border(mask).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_border_is_closed_and_is_the_outer_edge(seed):
    from scipy import ndimage

    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(30, 30)), 2)
    labelled, count = ndimage.label(noise > noise.mean(), structure=np.ones((3, 3)))
    assert count
    mask = labelled == 1 + np.argmax(np.bincount(labelled.ravel())[1:])
    border = external_border(mask)
    assert mask[border[:, 0], border[:, 1]].all()
    assert (np.abs(border - np.roll(border, 1, axis=0)).max(axis=1) == 1).all()
    # every object pixel with a side neighbour in the outside (not a hole) is on it
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    outside = outside == outside[0, 0]
    touched = ndimage.binary_dilation(outside)[1:-1, 1:-1] & mask
    found = np.zeros_like(mask)
    found[border[:, 0], border[:, 1]] = True
    assert found[touched].all()


@pytest.mark.parametrize("size", [41, 64])
def test_normals_of_a_disc_are_radial(size):
    mask = disc(size * 0.4, size)
    border = external_border(mask)
    normal = border_normals(border, 5)
    radial = border - (size - 1) / 2
    radial /= np.linalg.norm(radial, axis=1, keepdims=True)
    assert np.allclose(np.linalg.norm(normal, axis=1), 1.0)
    assert np.abs((normal * radial).sum(axis=1)).min() > 0.95


def test_normals_of_straight_edges():
    mask = np.zeros((60, 60), dtype=np.uint8)
    mask[10:50, 10:50] = 1
    border = external_border(mask)
    normal = border_normals(border, 3)
    left = (border[:, 1] == 10) & (np.abs(border[:, 0] - 30) < 10)
    top = (border[:, 0] == 10) & (np.abs(border[:, 1] - 30) < 10)
    assert np.allclose(np.abs(normal[left]), [0, 1]) and np.allclose(np.abs(normal[top]), [1, 0], atol=1e-6)
    assert np.isfinite(border_normals(np.zeros((3, 2), dtype=int), 2)).all()  # all neighbours the same pixel


def test_fill_by_hand():
    square = fill_polygon(np.array([(1, 1), (3, 1), (3, 3), (1, 3)]), (5, 5))
    assert square.sum() == 9 and square[1:4, 1:4].all()
    assert fill_polygon(np.empty((0, 2), dtype=int), (4, 4)).sum() == 0
    assert fill_polygon(np.array([(2, 3)]), (4, 4)).nonzero() == (np.array([2]), np.array([3]))
    line = fill_polygon(np.array([(0, 0), (3, 3)]), (4, 4))
    assert np.array_equal(line, np.eye(4, dtype=bool))
    bow = fill_polygon(np.array([(0, 0), (8, 8), (8, 0), (0, 8)]), (9, 9))  # crossing edges: two triangles
    assert bow[1, 4] and bow[7, 4] and not bow[4, 1] and not bow[4, 7]


@pytest.mark.parametrize("radius", [1.5, 6, 13.3])
def test_filling_a_border_gives_the_object_back(radius):
    mask = disc(radius, 31)
    assert np.array_equal(fill_polygon(external_border(mask), mask.shape), mask)


def test_fill_agrees_with_even_odd_counting():
    rng = np.random.default_rng(0)
    for _ in range(10):
        points = rng.integers(0, 20, (rng.integers(3, 9), 2))
        filled = fill_polygon(points, (20, 20))
        for row, column in rng.integers(0, 20, (40, 2)):
            following, inside = np.roll(points, -1, axis=0), False
            for (r0, c0), (r1, c1) in zip(points, following, strict=True):
                if (r0 <= row) != (r1 <= row):
                    inside ^= bool(column >= c0 + (row - r0) * (c1 - c0) / (r1 - r0))
            if inside:
                assert filled[row, column]


def test_dice():
    first, second = np.array([[1, 1, 0], [2, 0, 0]]), np.array([[1, 0, 0], [0, 0, 0]])
    assert mask_dice(first, second) == pytest.approx((2 / 3 + 0) / 2)
    assert mask_dice(np.zeros((2, 2)), np.zeros((2, 2))) == 1.0
    assert mask_dice(first, first) == 1.0
