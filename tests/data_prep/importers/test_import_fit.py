"""Bringing images and masks to one size: hand-worked cells, every type, shapes that change."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.importers.fit import (
    Fit,
    fit_image,
    fit_mask,
    fitted_spacing,
    frame,
    frame_shape,
    nearest_index,
    shares,
)


def test_box_is_the_mean_of_the_pixels_of_a_cell() -> None:
    image = np.array([[0, 2, 10, 20], [4, 6, 30, 40]], dtype=np.uint8)
    assert fit_image(image, (1, 2), filter="box").tolist() == [[3, 25]]
    assert fit_image(image, (1, 2), filter="nearest").tolist() == [[6, 40]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("channels", [(), (2,), (3,), (4,)])
def test_type_and_channels_stay(dtype: str, channels: tuple[int, ...]) -> None:
    image = np.full((6, 9, *channels), 7).astype(dtype)
    for how in ("stretch", "crop"):
        fitted = fit_image(image, (4, 4), how)
        assert fitted.dtype == dtype and fitted.shape == (4, 4, *channels) and (fitted == 7).all()


def test_8_bit_images_are_scaled_as_pillow_scales_them() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(colour).resize((8, 6), Image.Resampling.BILINEAR))
    assert np.array_equal(fit_image(colour, (6, 8)), expected)


def test_16_bit_images_are_rounded_and_do_not_wrap_around() -> None:
    image = np.array([[65535, 65534]], dtype=np.uint16)
    assert fit_image(image, (1, 1), filter="box").tolist() == [[65534]]  # 65534.5 to even
    edge = np.zeros((8, 8), dtype=np.uint16)
    edge[:, 4:] = 65535  # bicubic overshoots here
    wide = fit_image(edge, (16, 16), filter="bicubic")
    assert wide.min() == 0 and wide.max() == 65535


def test_the_same_size_is_given_back_untouched() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert fit_image(image, (4, 4)) is image and fit_mask(image, (4, 4)) is image


def test_pad_and_crop_keep_the_middle_and_the_proportions() -> None:
    image = np.array([[1, 2, 3, 4]], dtype=np.uint8)
    assert frame(image, (2, 2), "crop").tolist() == [[2]]  # the middle of 4 is taken one to the left
    assert frame(image, (2, 2), "pad").tolist() == [[0] * 4, [1, 2, 3, 4], [0] * 4, [0] * 4]
    assert frame(image, (2, 2), "pad", fill=9)[0].tolist() == [9] * 4
    assert frame_shape((960, 999), (256, 256), "crop") == (960, 960)
    assert frame_shape((100, 60), (128, 256), "pad") == (100, 200)
    assert frame_shape((100, 60), (128, 256), "crop") == (30, 60)
    assert frame_shape((1, 500), (500, 1), "crop") == (1, 1)


def test_spacing_follows_the_size() -> None:
    assert fitted_spacing((0.5, 0.5), (100, 60), (50, 50), "pad").tolist() == [1.0, 1.0]
    assert fitted_spacing((0.5, 0.5), (100, 60), (50, 60), "stretch").tolist() == [1.0, 0.5]
    assert fitted_spacing((0.5, 2.0), (100, 60), None, "pad").tolist() == [0.5, 2.0]


def test_shares_by_hand() -> None:
    region = np.array([[True, False, True]])
    assert np.allclose(shares(region, (1, 2)), [[2 / 3, 2 / 3]])
    assert shares(region, (2, 6)).tolist() == [[1, 1, 0, 0, 1, 1]] * 2  # it grows: nearest


def test_classes_take_the_largest_share_and_ties_the_lowest() -> None:
    mask = np.array([[1, 1, 0, 2], [0, 0, 2, 1], [3, 3, 3, 1], [3, 1, 2, 1]], dtype=np.uint8)
    assert fit_mask(mask, (2, 2)).tolist() == [[0, 2], [3, 1]]


def test_area_counts_everything_but_0_against_the_threshold() -> None:
    mask = np.array([[0, 255, 255, 255]], dtype=np.uint8)
    assert fit_mask(mask, (1, 2), rule="area").tolist() == [[0, 1]]  # half is not more than half
    assert fit_mask(mask, (1, 2), rule="area", threshold=0.4).tolist() == [[1, 1]]
    assert fit_mask(mask, (1, 4), rule="area").tolist() == [[0, 1, 1, 1]]


def test_majority_takes_what_is_drawn() -> None:
    drawn = np.array([[4, 4, 2, 4], [4, 0, 4, 4], [4, 4, 4, 1], [4, 4, 1, 3]], dtype=np.uint8)
    assert fit_mask(drawn, (2, 2), rule="majority", ignore=4).tolist() == [[0, 2], [4, 1]]
    assert fit_mask(drawn, (2, 2), rule="majority").tolist() == [[4, 4], [4, 1]]
    assert fit_mask(np.full((2, 2), 4, np.uint8), (1, 1), rule="majority", ignore=4).tolist() == [[4]]


@pytest.mark.parametrize("rule", ["classes", "majority", "nearest"])
def test_masks_that_grow_take_the_nearest(rule: str) -> None:
    mask = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    assert fit_mask(mask, (4, 4), rule=rule).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2


def test_nearest_is_the_middle_as_in_pillow() -> None:
    for old, new in ((5, 2), (2, 5), (7, 7), (450, 128)):
        row = np.arange(old, dtype=np.float32)[None]
        expected = np.asarray(Image.fromarray(row).resize((new, 1), Image.Resampling.NEAREST))[0]
        assert np.array_equal(nearest_index(old, new), expected)


def test_unknown_words_are_named() -> None:
    with pytest.raises(ValueError, match="fit: expected stretch or pad or crop, got 'squash'"):
        Fit(fit="squash")
    with pytest.raises(ValueError, match="rule: expected"):
        fit_mask(np.zeros((2, 2), np.uint8), (1, 1), rule="vote")
