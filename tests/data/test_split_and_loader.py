"""Splits and batches: decoding, order, subsets, replaced targets, singletons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.data.augment import Augment
from fedmed.data.loader import batches, num_batches
from fedmed.data.site_file import SiteData, SiteFile
from fedmed.data.split import Batch, make_decoder
from fedmed.errors import UserError


def site_data(image: np.ndarray, target: np.ndarray, task: str = "classification", **more: object) -> SiteData:
    """A site whose images are all in the train split."""
    count, channels = len(image), image.shape[3] if image.ndim == 4 else 1
    names = [str(i) for i in range(count)]
    return SiteData(
        name="s",
        task=task,
        classes=("a", "b", "c"),
        channels=tuple("xyz"[:channels]),
        image_size=(image.shape[1], image.shape[2]),
        label_kind="label",
        image=image,
        target=target,
        item_id=names,
        group_id=names,
        splits={"train": np.arange(count, dtype=np.int32)},
        **more,  # type: ignore[arg-type]
    )


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_decoding_by_hand() -> None:
    image = np.array([0, 51, 102, 255], np.uint8).reshape(1, 2, 2)
    plain = site_data(image, np.zeros(1, np.int64)).split("train").batch(torch.tensor([0])).images
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain.flatten(), torch.tensor([0.0, 0.2, 0.4, 1.0]))
    scaled = (
        site_data(image, np.zeros(1, np.int64), mean=[0.4], std=[0.2]).split("train").batch(torch.tensor([0])).images
    )
    torch.testing.assert_close(scaled.flatten(), torch.tensor([-2.0, -1.0, 0.0, 3.0]))


@pytest.mark.parametrize(("kind", "top"), [(np.uint8, 255), (np.uint16, 65535), (np.float16, 1), (np.float32, 1)])
def test_types_decode_to_the_unit_range(kind: type, top: int) -> None:
    image = np.array([0, top, top // 2 if top > 1 else 0.5, 0], kind).reshape(1, 2, 2)
    site = site_data(image, np.zeros(1, np.int64))
    decoded = site.split("train").batch(torch.tensor([0])).images.flatten()
    torch.testing.assert_close(decoded, torch.tensor([0.0, 1.0, 0.5, 0.0]), atol=3e-3, rtol=0)
    assert site.split("train")._store.images.element_size() == np.dtype(kind).itemsize  # stays compact
    np.testing.assert_array_equal(site.image, image)  # decoding does not write into the store


def test_channels_come_first_and_share_the_memory_of_the_site(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        data = file.site("alpha", mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5])
    split = data.split("train")
    batch = split.batch(torch.tensor([2]))
    expected = (data.image[2].astype(np.float32) / 255 - np.float32([0.1, 0.2, 0.3])) / np.float32(0.5)
    np.testing.assert_allclose(batch.images[0].permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert split._store.images.data_ptr() == data.image.__array_interface__["data"][0]
    assert batch.targets.dtype == torch.int64 and batch.targets.shape == (1, 8, 8)
    assert data.split("train") is split and data.split("test")._store is split._store


def test_wrong_normalisation() -> None:
    with pytest.raises(UserError, match=r"data\.mean needs one number or one per channel"):
        make_decoder([0.1, 0.2], None, 3)
    with pytest.raises(UserError, match=r"data\.std must be positive"):
        make_decoder(None, [0.1, 0.0, 0.1], 3)


def test_subset_and_with_targets_keep_site_positions() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    image = np.arange(6, dtype=np.uint8).repeat(4).reshape(6, 2, 2)
    site = site_data(image, labels)
    site.splits["train"] = np.array([5, 3, 1, 0], np.int32)
    split = site.split("train")
    assert split.index.tolist() == [5, 3, 1, 0] and split.targets.tolist() == [2, 0, 1, 0]
    assert split.class_counts().tolist() == [2, 1, 1]
    part = split.subset(torch.tensor([2, 0]))
    assert part.index.tolist() == [1, 5] and part.targets.tolist() == [1, 2]
    assert split.subset(torch.tensor([False, True, False, True])).index.tolist() == [3, 0]
    fresh = split.with_targets(torch.tensor([1, 1, 2, 2]))
    assert fresh.subset(torch.tensor([3, 0])).targets.tolist() == [2, 1]
    batch = fresh.subset(torch.tensor([3, 0])).batch(torch.tensor([1]))
    assert batch.index.tolist() == [5] and batch.targets.tolist() == [1]
    assert int(batch.images[0, 0, 0, 0] * 255 + 0.5) == 5
    assert len(split.subset(torch.zeros(0, dtype=torch.int64))) == 0
    with pytest.raises(ValueError, match="got 3 targets"):
        split.with_targets(torch.zeros(3))


def test_soft_targets_stay_floats() -> None:
    site = site_data(np.zeros((2, 2, 2), np.uint8), np.array([0, 1]))
    soft = site.split("train").with_targets(torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.75, 1.0]], dtype=torch.float64))
    assert soft.batch(torch.tensor([0])).targets.dtype == torch.float32
    assert soft.class_counts().tolist() == [1, 1, 1]


def test_class_counts_of_positives_and_of_pixels() -> None:
    flags = np.array([[1, 0, 1], [1, 0, 0]])
    assert site_data(np.zeros((2, 2, 2), np.uint8), flags, "multilabel").split("train").class_counts().tolist() == [
        2,
        0,
        1,
    ]
    masks = np.array([[[0, 1], [3, 3]], [[2, 1], [1, 3]]], np.uint8)  # 3: not annotated
    assert site_data(np.zeros((2, 2, 2), np.uint8), masks, "segmentation").split("train").class_counts().tolist() == [
        1,
        3,
        1,
    ]


def test_order_is_the_permutation_of_the_generator() -> None:
    site = site_data(np.zeros((7, 2, 2), np.uint8), np.zeros(7, np.int64))
    split = site.split("train")
    seen = torch.cat([b.index for b in batches(split, 3, rng(5), skip_singleton=False)])
    assert torch.equal(seen, torch.randperm(7, generator=rng(5)))
    assert torch.cat([b.index for b in batches(split, 3)]).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("n", "size", "skip", "lengths"),
    [
        (7, 3, True, [3, 3]),
        (7, 3, False, [3, 3, 1]),
        (6, 3, True, [3, 3]),
        (8, 3, True, [3, 3, 2]),
        (1, 4, True, []),
        (3, 1, True, [1, 1, 1]),
        (0, 4, False, []),
        (1, 4, False, [1]),
    ],
)
def test_last_batch_of_one(n: int, size: int, skip: bool, lengths: list[int]) -> None:
    split = site_data(np.zeros((n, 2, 2), np.uint8), np.zeros(n, np.int64)).split("train")
    assert [len(b) for b in batches(split, size, rng(), skip_singleton=skip)] == lengths
    assert num_batches(n, size, skip) == len(lengths)


def test_by_default_only_shuffled_epochs_skip_a_singleton() -> None:
    split = site_data(np.zeros((4, 2, 2), np.uint8), np.zeros(4, np.int64)).split("train")
    assert [len(b) for b in batches(split, 3)] == [3, 1]
    assert [len(b) for b in batches(split, 3, rng())] == [3]
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        next(batches(split, 0))
    with pytest.raises(ValueError, match="needs a generator"):
        next(batches(split, 2, augment=Augment(["hflip"])))


def test_augmented_batches_keep_their_source_and_move_masks(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        split = file.site("alpha", mean=[0.5], std=[0.25]).split("train")
    augment = Augment(["hflip", "vflip", "transpose", "shift2", "intensity"])
    plain = list(batches(split, 4, rng(1)))
    assert all(b.source is b.images for b in plain)
    moved = list(batches(split, 4, rng(1), augment))
    again = list(batches(split, 4, rng(1), augment))
    torch.testing.assert_close(moved[0].source, plain[0].images)
    assert torch.equal(moved[0].index, plain[0].index) and moved[0].targets.dtype == torch.int64
    assert not torch.equal(moved[0].images, plain[0].images)
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in zip(moved, again, strict=True)
    )


def test_loader_equals_the_augmentation_of_decoded_images(seg_file: Path) -> None:
    with SiteFile.open(seg_file) as file:
        split = file.site("alpha", mean=[0.5], std=[0.25]).split("train")
    augment = Augment(["hflip", "rot90", "shift", "affine", "intensity"])
    batch = next(batches(split, 6, rng(3), augment))
    generator = rng(3)
    torch.randperm(6, generator=generator)
    plain = split.batch(batch.index)
    images, masks = augment(plain.images, plain.targets, generator)
    torch.testing.assert_close(batch.images, images)
    assert masks is not None and torch.equal(batch.targets, masks)


def test_batch_source_is_decoded_once_and_may_be_given() -> None:
    calls = []

    def decode() -> torch.Tensor:
        calls.append(1)
        return torch.ones(1)

    batch = Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), source=decode)
    assert batch.source is batch.source and calls == [1]
    assert Batch(torch.zeros(2), torch.zeros(2), torch.zeros(2)).extras == {}
