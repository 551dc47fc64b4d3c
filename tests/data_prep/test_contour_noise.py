from __future__ import annotations

import numpy as np
import pytest

from data_prep.corruption import TrainPool
from data_prep.corruption.contour_noise import (
    ContourNoise,
    Evolution,
    client_noise_parameters,
    contour_noise,
    curve_operator,
    draw_offset_curve,
    evolve_object,
    offset_curve,
)
from data_prep.geometry import mask_dice
from data_prep.seeding import Seed
from fedmed.config import params_from
from fedmed.errors import UserError


def disc(radius: float, size: int = 128, row: float = 0.0) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] - size / 2
    return ((rows - row) ** 2 + columns**2 <= radius**2).astype(np.uint8)


@pytest.mark.parametrize(("fraction", "shrinkers"), [(0.2, [1, 8, 19, 22, 32, 34, 41, 45, 47, 49]), (0.8, None)])
def test_published_client_parameters(fraction, shrinkers):
    means, stds = client_noise_parameters(50, 0.0, 20.0, 10.0, int(fraction * 50), np.random.RandomState(0))
    assert np.allclose(np.abs(means[:3]), [10.9763, 14.3038, 12.0553], atol=5e-5)
    assert np.allclose(stds[:2], [6.0841, 7.8259], atol=5e-5)
    assert (means < 0).sum() == int(fraction * 50)
    if shrinkers is not None:
        assert np.flatnonzero(means < 0).tolist() == shrinkers


def test_bounded_means():
    means, stds = client_noise_parameters(12, 2.0, 5.0, 2.0, 2, np.random.default_rng(0))
    assert np.abs(means).min() >= 2 and np.abs(means).max() <= 5 and (means < 0).sum() == 2
    assert stds.min() >= 1 and stds.max() <= 2
    with pytest.raises(UserError, match="shrinkers"):
        client_noise_parameters(3, 0.0, 5.0, 2.0, 4, np.random.RandomState(0))


@pytest.mark.parametrize("length", [30, 59, 200, 313, 1000])
def test_equal_control_offsets_give_a_constant_curve(length):
    offset, accepted = offset_curve(np.full(30, 5.0), length, Evolution())
    assert accepted and np.abs(offset - 5.0).max() < 1e-6


@pytest.mark.parametrize(("length", "even"), [(90, False), (200, False), (313, False), (100, True)])
def test_curve_is_the_weighted_least_squares_polynomial(length, even):
    control = np.random.default_rng(length).normal(4, 2, 30)
    step = length / 30 if even else length // 30
    position = np.append(np.arange(30) * step, length) / length
    weights = np.r_[10.0, np.ones(29), 10.0]
    fit = np.polyfit(position, np.append(control, control[0]), 10, w=weights)
    expected = np.clip(np.polyval(fit, np.arange(length) / length), -30, 30)
    offset, accepted = offset_curve(control, length, Evolution(even_spacing=even))
    assert np.abs(offset - expected).max() < 1e-5
    assert accepted == (abs(expected[0] - expected[-1]) < 3)
    assert not curve_operator(length, 30, 10, even).flags.writeable


def test_redraw_is_bounded_and_keeps_the_smallest_gap():
    settings = Evolution(max_attempts=5)
    offset = draw_offset_curve(59, 0.0, 200.0, settings, np.random.RandomState(0))
    rng = np.random.RandomState(0)
    curves = [offset_curve(rng.normal(0.0, 200.0, 30), 59, settings)[0] for _ in range(5)]
    gaps = [abs(curve[0] - curve[-1]) for curve in curves]
    first_good = next((index for index, gap in enumerate(gaps) if gap < 3), int(np.argmin(gaps)))
    assert np.array_equal(offset, curves[first_good])


@pytest.mark.parametrize(
    ("mean", "std", "ratio", "dice"), [(8, 2, 1.65, 0.755), (-8, 2, 0.56, 0.72), (0, 4, 0.97, 0.94)]
)
def test_sanity_figures_of_a_disc(mean, std, ratio, dice):
    mask = disc(30)
    draws = [contour_noise(mask, mean, std, np.random.RandomState(seed)) for seed in range(20)]
    assert np.mean([draw.sum() / mask.sum() for draw in draws]) == pytest.approx(ratio, abs=0.1)
    assert np.mean([mask_dice(mask, draw) for draw in draws]) == pytest.approx(dice, abs=0.1)


def test_no_noise_gives_the_object_back():
    mask = disc(20, 64)
    assert np.array_equal(contour_noise(mask, 0.0, 0.0, np.random.RandomState(0)), mask)
    grown = contour_noise(mask, 4.0, 0.0, np.random.RandomState(0))
    assert grown.sum() / mask.sum() == pytest.approx(24**2 / 20**2, abs=0.1)
    assert (grown >= mask).all()


def test_empty_tiny_and_full_masks():
    rng = np.random.RandomState(0)
    assert contour_noise(np.zeros((20, 20), np.uint8), 5, 1, rng).sum() == 0
    tiny = disc(2, 32)
    assert contour_noise(tiny, 5, 1, rng).sum() == 0  # border below 30 pixels: the object vanishes
    assert contour_noise(np.ones((40, 40), np.uint8), -5, 1, rng).all()  # nothing around it: unchanged


def test_objects_share_one_generator_and_small_extras_vanish():
    two = np.zeros((128, 128), dtype=np.uint8)
    two[5:45, 5:45], two[60:120, 60:120] = 1, 1
    crumbs = two.copy()
    crumbs[0, 0] = crumbs[127, 0:10] = 1
    whole = contour_noise(two, 2.0, 1.0, np.random.RandomState(3))
    assert np.array_equal(whole, contour_noise(crumbs, 2.0, 1.0, np.random.RandomState(3)))
    rng = np.random.RandomState(3)
    large = evolve_object(two.astype(bool) & (np.arange(128) > 50)[:, None], 2.0, 1.0, rng, Evolution())
    small = evolve_object(two.astype(bool) & (np.arange(128) < 50)[:, None], 2.0, 1.0, rng, Evolution())
    assert np.array_equal(whole.astype(bool), large | small)


def test_non_square_images_clip_each_axis_by_its_own_size():
    wide = np.zeros((48, 160), dtype=np.uint8)
    wide[10:38, 100:150] = 1
    grown = contour_noise(wide, 3.0, 0.0, np.random.RandomState(0))
    tall = contour_noise(np.ascontiguousarray(wide.T), 3.0, 0.0, np.random.RandomState(0))
    assert grown[:, 150:153].any() and grown[10:38, 100:150].all()
    assert abs(int(grown.sum()) - int(tall.sum())) <= 40


def test_classes_are_evolved_one_by_one_and_the_smaller_result_lies_on_top():
    mask = disc(40) + disc(20)  # a ring of class 1 around class 2
    noisy = contour_noise(mask, 3.0, 0.5, np.random.RandomState(0))
    assert noisy.dtype == mask.dtype and set(np.unique(noisy)) == {0, 1, 2}
    assert (noisy == 2).sum() > (mask == 2).sum() and (noisy > 0).sum() > (mask > 0).sum()


def test_apply_reports_overlap_and_direction():
    masks = np.stack([disc(14 + item % 3, 64) for item in range(12)])
    pool = TrainPool(masks, masks, np.repeat([0, 1, 3], 4), np.arange(12), 4, 2)
    noise = ContourNoise(mean_low=3.0, mean_high=5.0, std=1.0, num_shrinkers=2)
    result = noise.apply(pool, Seed(0))
    assert result.targets.shape == masks.shape and result.targets.dtype == masks.dtype
    for client, facts in enumerate(result.facts):
        members = pool.client == client
        if not members.any():
            assert facts["mean_dice"] == 1.0 and not facts["is_noisy"]
            continue
        scores = [mask_dice(a, b) for a, b in zip(masks[members], result.targets[members], strict=True)]
        assert facts["mean_dice"] == pytest.approx(np.mean(scores))
        assert facts["noise_rate"] == pytest.approx(1 - np.mean(scores))
        grows = result.targets[members].sum() > masks[members].sum()
        assert facts["direction"] == ("expansion" if grows else "shrinkage")
    assert sum(facts["direction"] == "shrinkage" for facts in result.facts) == 2
    assert np.array_equal(result.targets, noise.apply(pool, Seed(0)).targets)


def test_bad_parameters_are_user_errors():
    for args in ({"degree": 31}, {"half_window": 0}, {"shrink_fraction": 1.5}, {"segmnts": 3}):
        with pytest.raises(UserError, match=r"data\.corruption\.args"):
            params_from(ContourNoise, args, "data.corruption.args")
