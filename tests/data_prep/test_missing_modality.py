from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from data_prep.corruption import ImageStack
from data_prep.corruption.missing_modality import (
    MissingModality,
    availability_patterns,
    bernoulli_masks,
    dealt_masks,
    drop_channels,
    pattern_quotas,
    published_masks,
    with_really_missing,
)
from data_prep.protocol import derive, describe
from data_prep.seeding import Seed
from fedmed.config import DataConfig, StepConfig, load_config, params_from
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.errors import UserError


def words(patterns: np.ndarray) -> str:
    return " ".join("".join(map(str, pattern)) for pattern in patterns)


def test_patterns():
    assert words(availability_patterns(2)) == "11 10 01"
    assert words(availability_patterns(3)) == "111 110 101 100 011 010 001"
    four = words(availability_patterns(4)).split()
    assert four[:4] == ["1111", "1101", "1110", "1100"] and len(set(four)) == 15 and "0000" not in four


def test_published_quotas():
    quotas = pattern_quotas([0.2, 0.4, 0.6, 0.8], 219)
    assert quotas.tolist() == [8, 12, 33, 50, 5, 22, 8, 33, 2, 3, 8, 12, 1, 5, 2] and quotas.sum() == 204


def test_quotas_by_hand_and_the_least_of_one():
    assert pattern_quotas([0.25, 0.5], 16).tolist() == [6, 6, 2]  # 16 * .75 * .5, the same, 16 * .25 * .5
    assert pattern_quotas([0.25, 0.5], 0).tolist() == [1, 1, 1]
    assert pattern_quotas([0.0, 1.0], 4).tolist() == [1, 4, 1]
    assert pattern_quotas([0.0, 1.0], 4, skip_impossible=True).tolist() == [0, 4, 0]


def test_masks_before_the_shuffle():
    patterns = availability_patterns(2)
    assert words(dealt_masks(patterns, np.array([2, 1, 1]), 6)) == "11 11 10 01 00 00"
    assert words(dealt_masks(patterns, np.array([2, 1, 1]), 3)) == "11 11 10"
    assert dealt_masks(patterns, np.array([1, 1, 1]), 0).shape == (0, 2)


def twin(rates: list[float], count: int, seed: int) -> np.ndarray:
    """The published generator step by step, with the global generator it uses."""
    kept = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    columns = [np.random.rand(count) for _ in rates]  # noqa: NPY002
    for column in columns:
        column[:] = 0
    start = 0
    for pattern in availability_patterns(len(rates)):
        share = float(count)
        for flag, rate in zip(pattern, rates, strict=True):
            share = share * (1 - rate) if flag else share * rate
        stop = start + max(1, int(share))
        for column, flag in zip(columns, pattern, strict=True):
            column[start:stop] = flag
        start = stop
    state = np.random.get_state()  # noqa: NPY002
    for column in columns:
        np.random.set_state(state)  # noqa: NPY002
        np.random.shuffle(column)  # noqa: NPY002
    for case in range(count):
        while not any(column[case] for column in columns):
            for column, rate in zip(columns, rates, strict=True):
                column[case] = np.random.rand(1)[0] > rate  # noqa: NPY002
    np.random.set_state(kept)  # noqa: NPY002
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    ("rates", "count", "seed"),
    [([0.2, 0.4, 0.6, 0.8], 219, 1037), ([0.5, 0.5, 0.2], 60, 7), ([0.8, 0.8], 31, 3), ([0.6, 0.2, 0.4], 5, 1)],
)
def test_published_masks_draw_as_the_global_generator(rates, count, seed):
    masks = published_masks(rates, count, np.random.RandomState(seed))
    assert np.array_equal(masks, twin(rates, count, seed)) and masks.any(axis=1).all()


def test_edges_of_the_generators():
    for make in (published_masks, bernoulli_masks):
        assert make([0.3, 0.4], 0, np.random.RandomState(0)).shape == (0, 2)
        assert make([0.9, 0.9], 1, np.random.RandomState(0)).any()
    rng = np.random.RandomState(0)
    assert published_masks([0.0, 0.0, 0.0], 20, rng, skip_impossible=True).all()
    assert words(published_masks([0.0, 1.0], 3, rng, skip_impossible=True)) == "10 10 10"
    assert words(bernoulli_masks([1.0, 0.5], 3, rng)) == "01 01 01"


def test_bernoulli_rates():
    masks = bernoulli_masks([0.2, 0.5, 0.7], 4000, np.random.RandomState(0))
    empty = 0.2 * 0.5 * 0.7
    expected = [(rate - empty) / (1 - empty) for rate in (0.2, 0.5, 0.7)]  # empty cases are drawn again
    assert np.allclose(1 - masks.mean(axis=0), expected, atol=0.03) and masks.any(axis=1).all()


def test_what_is_really_missing_stays_missing():
    masks = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=np.uint8)
    real = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=np.uint8)
    left = with_really_missing(masks, real, [0.2, 0.4, 0.6], np.random.RandomState(0))
    assert left[0].tolist() == [1, 0, 0] and left[2].tolist() == [0, 1, 0]
    assert left[1].any() and not left[1, 0] and not (left & ~real & 1).any()
    only = with_really_missing(masks[1:2], real[1:2], [0.0, 1.0, 1.0], np.random.RandomState(0))
    assert only.tolist() == [[0, 1, 0]]  # both would always miss: the first stays
    none = with_really_missing(masks[:0], real[:0], [0.2, 0.4, 0.6], np.random.RandomState(0))
    assert none.shape == (0, 3)


def test_dropping_by_hand():
    images = np.full((3, 2, 2, 2), 7, dtype=np.uint8)
    present = np.array([[1, 1], [1, 0], [1, 1]], dtype=np.uint8)
    poor, now = drop_channels(images, present, np.array([0, 1]), np.array([[0, 1], [0, 1]], dtype=np.uint8))
    assert poor is not None and now.tolist() == [[0, 1], [1, 0], [1, 1]]  # image 1 has nothing but channel 0
    assert not poor[0, ..., 0].any() and (poor[0, ..., 1] == 7).all() and (poor[1:] == 7).all()
    assert (images == 7).all()
    same, now = drop_channels(images, present, np.array([2]), np.ones((1, 2), dtype=np.uint8))
    assert same is None and now.tolist() == present.tolist()


def stack(cases: int, slices: int = 2, channels: int = 3, present: np.ndarray | None = None) -> ImageStack:
    size = cases * slices
    images = np.full((size, 4, 4, channels), 9, dtype=np.uint8)
    groups = np.repeat([f"case{case:03d}".encode() for case in range(cases)], slices)
    return ImageStack(images, present, groups, np.arange(size * 3 // 4))


def test_slices_of_a_case_share_a_mask_and_other_splits_stay():
    site = stack(20)
    result = MissingModality(rates=[0.3, 0.4, 0.6]).apply_images([site], None, Seed(0))
    assert result.present is not None and result.images[0] is not None and result.central is None
    present, images = result.present[0], result.images[0]
    assert np.array_equal(present[::2], present[1::2]) and present.any(axis=1).all()
    assert present[30:].all() and (images[30:] == 9).all()
    assert np.array_equal(images.any(axis=(1, 2)), present != 0)
    facts = result.facts[0]
    assert facts["n_cases"] == 15 and facts["n_dropped"] == int((present[:30:2] == 0).sum())
    assert facts["noise_rate"] == pytest.approx(facts["n_dropped"] / 45) and facts["is_noisy"] is True
    assert np.allclose(facts["achieved_rates"], 1 - present[:30].mean(axis=0))
    assert facts["missing_rates"].tolist() == [0.3, 0.4, 0.6] and facts["n_really_missing"] == 0


def test_all_splits_on_request():
    site = stack(20)
    result = MissingModality(rates=0.5, only_train=False).apply_images([site], site, Seed(0))
    assert result.present is not None and result.facts[0]["n_cases"] == 20 and result.central is None
    assert not result.present[0][30:].all()


def test_rates_of_each_client_and_their_own_generators():
    protocol = MissingModality(rates=[[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]], generator="bernoulli")
    result = protocol.apply_images([stack(60)] * 3, None, Seed(0))
    achieved = [facts["achieved_rates"].argmax() for facts in result.facts]
    assert achieved == [0, 1, 0]
    alone = protocol.apply_images([stack(60)], None, Seed(0))
    assert result.present is not None and alone.present is not None
    assert np.array_equal(alone.present[0], result.present[0])
    assert not np.array_equal(result.present[0], result.present[2])


def test_a_fixed_seed_gives_the_published_stream():
    rates = [0.2, 0.4, 0.6, 0.8]
    result = MissingModality(rates=rates, seed=1037).apply_images([stack(40, 1, 4)], None, Seed(5))
    expected = published_masks(rates, 30, np.random.RandomState(1037))
    assert result.present is not None and np.array_equal(result.present[0][:30], expected)


def test_clients_that_lack_nothing_keep_their_images():
    result = MissingModality(rates=[[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]).apply_images([stack(9)] * 2, None, Seed(0))
    assert result.images[0] is None and result.present is not None and result.present[0].all()
    assert result.facts[0]["noise_rate"] == 0.0 and not result.facts[0]["is_noisy"] and result.facts[1]["is_noisy"]
    empty = MissingModality().apply_images([stack(0)], None, Seed(0))
    assert empty.facts[0]["n_cases"] == 0 and empty.facts[0]["noise_rate"] == 0.0 and empty.images[0] is None
    assert empty.facts[0]["achieved_rates"].tolist() == [0.0] * 3


def test_really_missing_is_no_fault_of_the_protocol():
    present = np.ones((8, 3), dtype=np.uint8)
    present[:4, 2] = 0  # cases 0 and 1 never had channel 2
    site = ImageStack(np.full((8, 4, 4, 3), 9, np.uint8), present, np.repeat(np.arange(4), 2), np.arange(8))
    result = MissingModality(rates=[0.0, 0.0, 1.0]).apply_images([site], None, Seed(0))
    assert result.present is not None and result.images[0] is not None
    assert result.present[0].tolist() == [[1, 1, 0]] * 8
    facts = result.facts[0]
    assert (facts["n_really_missing"], facts["n_dropped"], facts["noise_rate"]) == (2, 2, 2 / 12)
    assert facts["achieved_rates"].tolist() == [0.0, 0.0, 1.0]
    assert (result.images[0][:4] == 9).all()  # what is stored for an absent channel stays
    assert not result.images[0][4:, ..., 2].any()
    sound = MissingModality(rates=0.0).apply_images([site], None, Seed(0))
    assert sound.facts[0]["is_noisy"] is False and sound.facts[0]["noise_rate"] == 0.0


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"rates": []}, "at least one rate"),
        ({"rates": [[0.1], []]}, "at least one rate"),
        ({"rates": [0.1, 1.2]}, r"\[0, 1\]"),
        ({"rates": [float("nan"), 0.2]}, r"\[0, 1\]"),
        ({"rates": 1.0}, "below 1"),
        ({"rates": [[0.1, 0.2], [1.0, 1.0]]}, "below 1 for each"),
        ({"generator": "uniform"}, "bernoulli"),
    ],
)
def test_arguments_are_checked(args, word):
    with pytest.raises(UserError, match=word):
        params_from(MissingModality, args, "data.corruption.args")


def test_what_does_not_fit_the_file():
    with pytest.raises(UserError, match="3 channels, got 2 rates"):
        MissingModality(rates=[0.1, 0.2]).apply_images([stack(3)], None, Seed(0))
    grey = ImageStack(np.zeros((3, 4, 4), np.uint8), None, np.arange(3), np.arange(3))
    with pytest.raises(UserError, match="one channel"):
        MissingModality().apply_images([grey], None, Seed(0))
    with pytest.raises(UserError, match="case000 has no modality"):
        MissingModality().apply_images([stack(2, present=np.zeros((4, 3), np.uint8))], None, Seed(0))


SMALL: dict[str, Any] = {"num_sites": 2, "images_per_site": 40, "image_size": 16}


def derived(folder: Path, seed: int = 0, **args: Any) -> Path:
    step = StepConfig("missing_modality", {"rates": [0.2, 0.4, 0.6], **args})
    return derive(DataConfig(path="phantom:multimodal", phantom=SMALL, corruption=step), seed, folder)


def test_the_derived_file(tmp_path):
    path = derived(tmp_path)
    source = derive(DataConfig(path="phantom:multimodal", phantom=SMALL), 0, tmp_path)
    with h5py.File(path) as file, h5py.File(source) as clean:
        assert "central" in file and "central_corrupted" not in file
        for group in ("site_00", "site_01"):
            node, was = file[group], clean[group]
            train = node.attrs["train_idx"]
            before, now = was["modality_present"][:], node["modality_present"][:]
            assert (now <= before).all() and (now[train] < before[train]).any()
            assert np.array_equal(np.delete(now, train, 0), np.delete(before, train, 0))
            assert np.array_equal(
                node["image"][:], was["image"][:] * ((now == before) | (before == 0))[:, None, None, :]
            )
            assert np.array_equal(node["reference/image"][:], was["image"][:])
            assert np.array_equal(node["reference/modality_present"][:], before)
            for case in np.unique(node["group_id"][:]):
                assert len(np.unique(now[node["group_id"][:] == case], axis=0)) == 1
    truth = read_truth(path)
    assert all(entry["is_noisy"] and entry["missing_rates"] == [0.2, 0.4, 0.6] for entry in truth.values())
    assert [row["achieved_rates"] for row in describe(path)] == [entry["achieved_rates"] for entry in truth.values()]
    with SiteFile.open(path) as opened:
        batch = opened.site("phantom-00").split("train").batch(torch.arange(2))
        assert batch.extras["modality_present"].shape == (2, 3)


def test_same_seed_same_masks(tmp_path):
    def masks(seed: int) -> np.ndarray:
        with h5py.File(derived(tmp_path / str(seed), seed, generator="bernoulli")) as file:
            return file["site_00/modality_present"][:]

    first = masks(0)
    (tmp_path / "0").rename(tmp_path / "old")
    assert np.array_equal(masks(0), first) and not np.array_equal(masks(1), first)


def test_example_protocol(tmp_path):
    small = [f"data.phantom.{key}={value}" for key, value in SMALL.items()]
    data = load_config("data/missing_modality", ["data.path=phantom:multimodal", *small]).data
    assert [row["missing_rates"] for row in describe(derive(data, 0, tmp_path))] == [[0.2, 0.4, 0.6], [0.6, 0.2, 0.4]]
