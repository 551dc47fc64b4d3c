"""Synthetic files: layout, determinism, what sites share and what they do not, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedmed.data.phantom import PHANTOM_KINDS, make_phantom, split_cases
from fedmed.data.phantom_draw import blur, depth, draw_outlines, grid, smooth_noise
from fedmed.data.site_file import SiteData, SiteFile
from fedmed.errors import UserError


def load(path: Path) -> list[SiteData]:
    with SiteFile.open(path) as file:
        return [file.site(info.name) for info in file.sites]


@pytest.mark.parametrize("kind", PHANTOM_KINDS)
def test_every_kind_is_a_site_file(tmp_path: Path, kind: str) -> None:
    sites = load(make_phantom(tmp_path / "p.h5", kind, num_sites=3, images_per_site=[30, 40, 50], image_size=32))
    assert [s.name for s in sites] == ["phantom-00", "phantom-01", "phantom-02"]
    for site, count in zip(sites, (30, 40, 50), strict=True):
        assert len(site.image) == count and site.image.dtype == np.uint8 and site.image_size == (32, 32)
        sizes = [site.num_examples(name) for name in ("train", "val", "test")]
        assert sum(sizes) == count and 0.6 < sizes[0] / count < 0.8 and sizes[1] >= 1 and sizes[2] >= 2
        assert site.image.std(axis=(1, 2)).min() > 0 or kind == "multimodal"
        groups = np.array(site.group_id)
        assert not set(groups[site.splits["train"]]) & set(groups[site.splits["test"]])
    assert sites[0].task == ("segmentation" if kind == "multimodal" else kind)


@pytest.mark.parametrize("kind", PHANTOM_KINDS)
def test_same_seed_same_sites_whatever_their_number(tmp_path: Path, kind: str) -> None:
    args = {"images_per_site": 12, "image_size": 16}
    first = load(make_phantom(tmp_path / "a.h5", kind, num_sites=2, seed=4, **args))
    second = load(make_phantom(tmp_path / "b.h5", kind, num_sites=3, seed=4, **args))
    other = load(make_phantom(tmp_path / "c.h5", kind, num_sites=2, seed=5, **args))
    for one, two in zip(first, second, strict=False):
        np.testing.assert_array_equal(one.image, two.image)
        np.testing.assert_array_equal(one.target, two.target)
        assert {k: v.tolist() for k, v in one.splits.items()} == {k: v.tolist() for k, v in two.splits.items()}
    assert not np.array_equal(first[0].image, other[0].image)
    assert not np.array_equal(first[0].image, first[1].image)


def test_lesions_are_darker_than_skin_and_neither_all_nor_nothing(tmp_path: Path) -> None:
    for site in load(make_phantom(tmp_path / "p.h5", "segmentation", num_sites=2, images_per_site=40)):
        area = site.target.reshape(len(site.target), -1).mean(axis=1)
        assert area.min() > 0.005 and area.max() < 0.75 and area.std() > 0.01
        grey = site.image.mean(axis=3)
        inside = np.array([g[m > 0].mean() - g[m == 0].mean() for g, m in zip(grey, site.target, strict=True)])
        assert (inside < 0).mean() > 0.85


def test_more_lesions_and_grey_images(tmp_path: Path) -> None:
    from scipy.ndimage import label

    several = load(make_phantom(tmp_path / "m.h5", "segmentation", num_sites=1, images_per_site=40, lesions=4))[0]
    parts = np.array([label(mask)[1] for mask in several.target])
    assert parts.min() >= 1 and parts.max() >= 3
    grey = load(make_phantom(tmp_path / "g.h5", "segmentation", num_sites=1, images_per_site=12, channels=1))[0]
    assert grey.image.ndim == 3 and grey.channels == ("grey",)


def test_classes_have_a_long_tail_and_differ_between_sites(tmp_path: Path) -> None:
    even = load(make_phantom(tmp_path / "e.h5", "classification", images_per_site=100, image_size=16, case_mix=0.0))
    counts = np.stack([np.bincount(s.target, minlength=6) for s in even])
    assert (counts == counts[0]).all() and (np.diff(counts[0]) < 0).all()
    skewed = load(make_phantom(tmp_path / "s.h5", "classification", images_per_site=100, image_size=16))
    counts = np.stack([np.bincount(s.target, minlength=6) for s in skewed])
    assert (counts.sum(1) == 100).all() and counts.std(axis=0).max() > 5


def test_no_site_shift_gives_sites_of_one_look(tmp_path: Path) -> None:
    args = {"images_per_site": 60, "image_size": 24, "case_mix": 0.0}
    spread = []
    for shift in (0.0, 1.0):
        sites = load(make_phantom(tmp_path / "p.h5", "segmentation", site_shift=shift, **args))
        spread.append(np.stack([s.image.mean(axis=(0, 1, 2)) for s in sites]).std(axis=0).max())
    assert spread[0] < 4 < spread[1]


def test_findings_co_occur(tmp_path: Path) -> None:
    site = load(make_phantom(tmp_path / "p.h5", "multilabel", num_sites=1, images_per_site=200, image_size=16))[0]
    number = site.target.sum(axis=1)
    assert site.target.shape == (200, 6) and number.min() == 0 and number.max() >= 3


def test_missing_contrasts_are_marked_and_empty(tmp_path: Path) -> None:
    sites = load(make_phantom(tmp_path / "p.h5", "multimodal", num_sites=3, images_per_site=40, image_size=32))
    present = [site.extras["modality_present"] for site in sites]
    assert present[0].all() and not present[1][:, 2].any() and 0 < present[2][:, 0].mean() < 1
    for site, flags in zip(sites, present, strict=True):
        assert flags[:, 1].all()  # FLAIR is always there
        shown = site.image.max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(shown, flags.astype(bool))
        assert site.target.reshape(40, -1).any(1).sum() < 40  # some slices show no lesion
    whole = load(
        make_phantom(tmp_path / "q.h5", "multimodal", images_per_site=12, image_size=16, missing_contrasts=False)
    )
    assert all(site.extras["modality_present"].all() for site in whole)


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("segmentatoin", {}, "did you mean 'segmentation'"),
        ("segmentation", {"num_sites": 0}, "num_sites must be an integer of at least 1"),
        ("segmentation", {"images_per_site": [20, 20]}, "lists 2 sites, num_sites is 4"),
        ("segmentation", {"images_per_site": 5}, "images_per_site must be an integer of at least 10, got 5"),
        ("segmentation", {"image_size": 8}, "image_size must be an integer of at least 16"),
        ("segmentation", {"channels": 2}, "must be 1 or 3, got 2"),
        ("multilabel", {"channels": 3}, "must be 1, got 3"),
        ("classification", {"tail": 0.0}, "0 < tail <= 1"),
        ("segmentation", {"images_per_site": "many"}, "got 'm'"),
        ("segmentation", {"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_unusable_arguments(tmp_path: Path, kind: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_phantom(tmp_path / "p.h5", kind, **args)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_cases_are_dealt_seventy_ten_twenty_within_each_class() -> None:
    group, strata = np.arange(200) // 2, np.repeat([0, 1], 100)
    splits = split_cases(np.random.default_rng(0), group, strata)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [140, 20, 40]
    for rows in splits.values():
        assert (strata[rows] == 0).mean() == 0.5 and len(np.unique(group[rows])) * 2 == len(rows)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(200))


def test_drawing_tools() -> None:
    rng = np.random.default_rng(0)
    noise = smooth_noise(rng, 3, 32, 0.1)
    assert noise.dtype == np.float32 and abs(float(noise.std()) - 1) < 1e-3
    circle = draw_outlines(rng, 1, np.array([0.5]), np.zeros(1), 0.0, elongation=1.0)
    y, x = grid(64)
    expected = 0.5 - np.hypot(y - circle.y[0], x - circle.x[0])
    np.testing.assert_allclose(depth(circle, 64)[0], expected, atol=1e-5)
    flat = np.full((1, 8, 8, 2), 0.3, np.float32)
    np.testing.assert_allclose(blur(flat, 1.2), flat, atol=1e-6)
    assert blur(flat, 0.0) is flat
