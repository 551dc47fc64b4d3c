from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from data_prep.corruption import ImageCorruption, ImageStack
from data_prep.corruption.contour_noise import ContourNoise
from data_prep.corruption.degrade import (
    JPEG_QUALITY,
    KINDS,
    LUMINANCE,
    NOISE_STD,
    degrade,
    gaussian_kernel,
    mean_abs_error,
    motion_kernel,
    quantisation,
    resampling,
)
from data_prep.corruption.image_quality import ImageQuality, corrupted_clients, degrade_stack
from data_prep.seeding import Seed
from fedmed.config import params_from
from fedmed.data.phantom import make_phantom
from fedmed.errors import UserError

DRAWING = ("gaussian_noise", "motion_blur")
SEVERITIES = range(1, 6)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> np.ndarray:
    path = make_phantom(
        tmp_path_factory.mktemp("phantom") / "skin.h5", "segmentation", num_sites=1, images_per_site=10, image_size=64
    )
    with h5py.File(path) as file:
        images: np.ndarray = file["site_00/image"][:4]
    return images


def rng(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def as_type(image: np.ndarray, name: str) -> np.ndarray:
    """The image in a type a site file may hold; floats with a range of their own."""
    if name == "uint16":
        return image.astype(np.uint16) * 257
    return image.astype(name) if name == "uint8" else (image / 100.0 - 1.0).astype(name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("grey", [False, True])
def test_error_grows_with_severity_and_shape_and_type_stay(phantom, kind, dtype, grey):
    for photo in phantom:
        image = as_type(photo[..., 1] if grey else photo, dtype)
        poor = [degrade(image, kind, severity, rng()) for severity in SEVERITIES]
        errors = [mean_abs_error(image, other) for other in poor]
        assert all(np.diff([0.0, *errors]) > 0), errors
        for other in poor:
            assert other.shape == image.shape and other.dtype == image.dtype
            if dtype.startswith("float"):
                assert other.min() >= image.min() and other.max() <= image.max()


@pytest.mark.parametrize("kind", KINDS)
def test_one_generator_one_result(phantom, kind):
    image = phantom[0]
    before = image.copy()
    first, again, other = (degrade(image, kind, 3, rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and np.array_equal(image, before)
    assert (kind in DRAWING) != np.array_equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_do_not_mix_and_both_axes_are_alike(phantom, kind):
    image = phantom[0]
    if kind == "motion_blur":
        turned = degrade(image[::-1, ::-1], kind, 4, rng())[::-1, ::-1]  # a symmetric kernel: nothing moves
        assert np.array_equal(turned, degrade(image, kind, 4, rng()))
    elif kind == "gaussian_noise":
        grey = degrade(np.full((200, 200, 2), 128, np.uint8), kind, 1, rng()) / 255.0
        assert np.allclose(grey.std(axis=(0, 1)), NOISE_STD[0], atol=0.002)
    else:
        split = np.stack([degrade(image[..., c], kind, 4, rng()) for c in range(3)], axis=-1)
        assert np.array_equal(split, degrade(image, kind, 4, rng()))
        if kind != "jpeg":  # its table differs a little between the axes
            turned = degrade(image.transpose(1, 0, 2), kind, 4, rng()).transpose(1, 0, 2)
            assert np.abs(turned.astype(int) - degrade(image, kind, 4, rng())).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 9), (2, 3, 4), (8, 8), (21, 13, 1), (0, 4, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_size_is_defined(kind, shape, dtype):
    image = as_type(np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8), dtype)
    for severity in SEVERITIES:
        poor = degrade(image, kind, severity, rng())
        assert poor.shape == shape and poor.dtype == image.dtype and np.isfinite(poor).all()
        assert 0.0 <= mean_abs_error(image, poor) <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_image(kind):
    image = np.full((20, 12, 3), 77, dtype=np.uint8)
    poor = degrade(image, kind, 5, rng())
    if kind == "gaussian_noise":
        assert poor.std() > 40
    elif kind == "jpeg":  # stays constant, but its mean is rounded to the step of the first coefficient, over 8
        assert (
            len(np.unique(poor)) == 1 and abs(int(poor[0, 0, 0]) - 77) <= quantisation(JPEG_QUALITY[4])[0, 0] / 16 + 1
        )
    else:
        assert np.array_equal(poor, image)
    flat = np.full((5, 5), 0.3, dtype=np.float32)  # a float without a range has no scale
    assert np.array_equal(degrade(flat, kind, 5, rng()), flat) and mean_abs_error(flat, flat) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_floats_follow_the_range_of_each_channel(phantom, kind):
    unit = phantom[0, ..., :2] / 255.0
    shifted = unit * [1.0, 50.0] + [0.0, -20.0]
    low, span = shifted.min(axis=(0, 1)), np.ptp(shifted, axis=(0, 1))
    scaled = degrade(shifted, kind, 3, rng())
    expected = degrade((shifted - low) / span, kind, 3, rng()) * span + low
    assert np.allclose(scaled, expected, atol=1e-9)


def test_pixels_that_are_not_finite_stay_and_spoil_nothing(phantom):
    image = phantom[0].astype(np.float32)
    image[3, 4, 0], image[5, 6, 1] = np.nan, np.inf
    for kind in KINDS:
        poor = degrade(image, kind, 3, rng())
        assert np.array_equal(np.isfinite(poor), np.isfinite(image)) and np.isnan(poor[3, 4, 0])
        assert 0 < mean_abs_error(image, poor) < 0.5
    nothing = np.full((3, 3), np.nan, dtype=np.float32)
    assert np.isnan(degrade(nothing, "gaussian_noise", 1, rng())).all() and mean_abs_error(nothing, nothing) == 0.0


def test_noise_by_hand():
    image = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    drawn = np.random.RandomState(7).normal(size=(2, 2)) * 0.18
    expected = (np.clip(image / 255 + drawn, 0, 1) * 255).astype(np.uint8)  # truncated, as published
    assert np.array_equal(degrade(image, "gaussian_noise", 3, rng(7)), expected)


def test_contrast_by_hand():
    image = np.array([[50, 150]], dtype=np.uint8)  # mean 100: 100 -+ 50 * 0.4
    assert degrade(image, "contrast", 1, rng()).tolist() == [[80, 120]]


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 6.0])
def test_blur_kernel_has_the_variance_asked_for(sigma):
    kernel = gaussian_kernel(sigma)
    place = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1.0) and np.array_equal(kernel, kernel[::-1])
    assert (kernel * place**2).sum() == pytest.approx(sigma**2, rel=2e-3)


def test_motion_kernel_lies_along_its_line():
    flat = motion_kernel(2.0, 100.0, 0.0)
    middle = len(flat) // 2
    assert flat[middle].sum() == pytest.approx(1.0) and np.count_nonzero(flat[middle]) == 5
    inner = flat[middle, middle - 1 : middle + 2]
    assert np.allclose(inner, inner.mean(), rtol=0.02)  # a wide Gaussian: even weights
    for angle in (-45.0, 17.0, 45.0):
        kernel = motion_kernel(5.0, 2.0, angle)
        rows, columns = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1.0) and np.allclose(kernel, kernel[::-1, ::-1])
        covariance, variance = (kernel * rows * columns).sum(), (kernel * columns**2).sum()
        assert np.sign(covariance) == np.sign(angle)
        assert covariance / variance == pytest.approx(np.tan(np.radians(angle)), abs=0.1)
    dot = motion_kernel(0.0, 1.0, 30.0)
    assert dot.max() == dot.sum() == 1.0


def test_quantisation_of_known_qualities():
    assert np.array_equal(quantisation(50), LUMINANCE)
    assert quantisation(25)[0, :3].tolist() == [32, 22, 20]  # twice the table
    assert quantisation(100).max() == 1 and quantisation(1).max() == 255


def test_resampling_by_hand():
    # 4 pixels to 2 cells: means of pairs a, b; back at -1/4, 1/4, 3/4, 5/4: a, (3a + b)/4, (a + 3b)/4, b
    first = [[0.5, 0.5, 0, 0], [0.375, 0.375, 0.125, 0.125]]
    assert np.allclose(resampling(4, 2), [*first, *np.array(first)[::-1, ::-1]])
    assert np.allclose(resampling(5, 5), np.eye(5)) and np.allclose(resampling(7, 3).sum(axis=1), 1.0)
    assert np.allclose(resampling(3, 1), 1 / 3)


def test_which_clients():
    assert corrupted_clients(5, 2, "last", rng()) == [3, 4]
    assert corrupted_clients(5, 0, "last", rng()) == [] and corrupted_clients(3, 3, "random", rng()) == [0, 1, 2]
    drawn = {tuple(corrupted_clients(6, 2, "random", rng(seed))) for seed in range(20)}
    assert len(drawn) > 5 and all(a < b < 6 for a, b in drawn)
    assert corrupted_clients(5, 2, [4, 0], rng()) == [0, 4]


def stacks(*sizes: int, channels: int = 3) -> list[ImageStack]:
    shape = (8, 8, channels)
    return [
        ImageStack(np.random.default_rng(client).integers(0, 256, (size, *shape)).astype(np.uint8))
        for client, size in enumerate(sizes)
    ]


def test_facts_and_images_of_every_client():
    sites = stacks(3, 2, 0, 4)
    noise = ImageQuality(num_corrupted=2, severity=[1, 5], which=[1, 2])
    result = noise.apply_images(sites, sites[0], Seed(0))
    assert [images is None for images in result.images] == [True, False, True, True]
    assert [fact["is_noisy"] for fact in result.facts] == [False, True, False, False]  # client 2 has no images
    assert [fact["noise_rate"] for fact in result.facts] == [0.0, 1.0, 0.0, 0.0]
    assert [fact["severity"] for fact in result.facts] == [0, 1, 0, 0]
    assert [fact["quality_kind"] for fact in result.facts] == ["clean", "gaussian_noise", "clean", "clean"]
    changed = result.images[1]
    assert changed is not None and result.central is not None
    realised = np.mean([mean_abs_error(a, b) for a, b in zip(sites[1].images, changed, strict=True)])
    assert result.facts[1]["mean_abs_error"] == pytest.approx(realised) and 0.03 < realised < 0.08
    strong = degrade_stack(sites[0], "gaussian_noise", 5, Seed(0).rng("image_quality/central"))
    assert np.array_equal(result.central, strong[0])  # the largest severity of the list
    mild = dataclasses.replace(noise, test_severity=1).apply_images(sites, sites[0], Seed(0)).central
    assert mild is not None and strong[1] > 3 * mean_abs_error(sites[0].images[0], mild[0])
    assert noise.apply_images(sites, None, Seed(0)).central is None


def test_clients_do_not_depend_on_each_other():
    sites = stacks(3, 2, 4)
    both = ImageQuality(which=[1, 2]).apply_images(sites, None, Seed(0)).images
    one = ImageQuality(which=[2]).apply_images(sites, None, Seed(0)).images
    assert np.array_equal(both[2], one[2]) and one[1] is None
    assert not np.array_equal(one[2], ImageQuality(which=[2]).apply_images(sites, None, Seed(1)).images[2])


def test_a_legacy_seed_is_one_stream_of_ascending_clients():
    sites = stacks(2, 3, 2)
    found = ImageQuality(num_corrupted=2, seed=0).apply_images(sites, None, Seed(5)).images
    stream = rng(0)
    for client in (1, 2):  # the clean client draws nothing
        expected = [degrade(image, "gaussian_noise", 3, stream) for image in sites[client].images]
        assert np.array_equal(found[client], expected)


def test_random_clients_come_from_the_seed():
    sites = stacks(*[1] * 8)
    pick = ImageQuality(num_corrupted=3, which="random")
    found = [tuple(pick.clients(8, Seed(seed))) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len(set(found)) > 2 and all(len(clients) == 3 for clients in found)
    fixed = dataclasses.replace(pick, seed=4)
    assert fixed.clients(8, Seed(0)) == fixed.clients(8, Seed(1))
    assert sum(images is not None for images in pick.apply_images(sites, None, Seed(0)).images) == 3


@pytest.mark.parametrize(("fraction", "clients", "count"), [(0.2, 20, 4), (0.2, 12, 2), (0.29, 100, 29), (0.0, 5, 0), (1.0, 5, 5)])  # fmt: skip
def test_a_fraction_is_rounded(fraction, clients, count):
    assert len(ImageQuality(corrupted_fraction=fraction).clients(clients, Seed(0))) == count


def test_absent_channels_stay_absent():
    stack = stacks(3, channels=2)[0]
    images = stack.images.copy()
    images[1, ..., 0] = 0
    present = np.array([[1, 1], [0, 1], [0, 0]], dtype=np.uint8)
    poor, _ = degrade_stack(ImageStack(images, present), "gaussian_noise", 3, rng())
    same = (poor == images).all(axis=(1, 2))
    assert same.tolist() == [[False, False], [True, False], [True, True]]
    grey, error = degrade_stack(ImageStack(images[..., 0], np.zeros((3, 1))), "gaussian_noise", 3, rng())
    assert np.array_equal(grey, images[..., 0]) and error == 0.0


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"kind": "gausian_noise"}, "did you mean 'gaussian_noise'"),
        ({"severity": 0}, r"severity of 1\.\.5, got 0"),
        ({"severity": [3, 6]}, "got 6"),
        ({"severity": []}, "empty list"),
        ({"severity": 2.5}, r"args\.severity"),
        ({"test_severity": 9}, "got 9"),
        ({"which": "first"}, "last, random"),
        ({"corrupted_fraction": 1.5}, "corrupted_fraction <= 1"),
        ({"number": 3}, "unknown key"),
    ],
)
def test_arguments_are_checked_when_read(args, word):
    with pytest.raises(UserError, match=word):
        params_from(ImageQuality, args, "data.corruption.args")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"num_corrupted": 4}, "0 <= num_corrupted <= 3"),
        ({"num_corrupted": -1}, "got -1"),
        ({"which": [0, 3]}, r"0\.\.2"),
        ({"which": [1, 1]}, "different"),
        ({"which": [0], "num_corrupted": 2}, "names 1 clients"),
        ({"num_corrupted": 2, "severity": [1]}, "1 entries"),
    ],
)
def test_numbers_are_checked_against_the_clients(args, word):
    with pytest.raises(UserError, match=word):
        ImageQuality(**args).apply_images(stacks(1, 1, 1), None, Seed(0))
    with pytest.raises(ValueError, match="severity"):
        degrade(np.zeros((2, 2), np.uint8), "jpeg", 6, rng())


def test_no_clients_at_all():
    result = ImageQuality().apply_images([], None, Seed(0))
    assert result.images == () and result.facts == ()


def test_corruptions_of_images_are_told_by_what_they_can_do():
    assert isinstance(ImageQuality(), ImageCorruption) and not isinstance(ContourNoise(), ImageCorruption)
