from __future__ import annotations

import numpy as np
import pytest

from data_prep.resize import area_mean, overlap, resize_classes, resize_images
from fedmed.errors import UserError


def test_overlap_by_hand():
    assert overlap(4, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert np.allclose(overlap(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    with pytest.raises(UserError, match=r"1\.\.4"):
        overlap(4, 5)


def test_images_by_area_mean_in_their_own_type():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert resize_images(image, 2).tolist() == [[[2, 4], [10, 12]]]  # 2.5 4.5 10.5 12.5, rounded to even
    colour = np.random.default_rng(0).integers(0, 255, (70, 6, 9, 3)).astype(np.uint8)
    assert resize_images(colour, 3).shape == (70, 3, 3, 3) and resize_images(colour, 3).dtype == np.uint8
    expected = colour.astype(float).reshape(70, 3, 2, 3, 3, 3).mean(axis=(2, 4))
    assert np.allclose(area_mean(colour, 3), expected, atol=1e-3)
    assert resize_images(colour.astype(np.float16), 3).dtype == np.float16


def test_masks_by_largest_share():
    mask = np.array([[[1, 1, 0, 2], [0, 0, 2, 1], [3, 3, 3, 1], [3, 1, 2, 1]]], dtype=np.uint8)
    # ties: half foreground is background; a cell of 0 2 2 1 is 2; three of four is 3; 3 1 2 1 is 1
    assert resize_classes(mask, 2).tolist() == [[[0, 2], [3, 1]]]
    binary = np.array([[[1, 1], [1, 0]]], dtype=np.uint8)
    assert resize_classes(binary, 1).tolist() == [[[1]]]


def test_scribbles_take_what_is_drawn():
    drawn = np.full((1, 4, 4), 4, dtype=np.uint8)
    drawn[0, 0, 0], drawn[0, 3, 2:] = 2, 0
    assert resize_classes(drawn, 2, ignore=4).tolist() == [[[2, 4], [4, 0]]]
