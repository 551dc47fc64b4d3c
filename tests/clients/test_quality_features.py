"""FedA3I at the site: regions, region losses, one-against-rest logits, and when features are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clients.quality_features import (
    QualityFeatures,
    QualityFeaturesParams,
    foreground_logits,
    image_features,
    region_map,
    region_maps,
    site_features,
)
from fedmed.data.loader import batches
from fedmed.losses.segmentation import bce_dice

NAN = float("nan")


def centre() -> np.ndarray:
    mask = np.zeros((5, 5))
    mask[2, 2] = 1
    return mask


def test_regions_of_one_pixel() -> None:
    expected = np.zeros((5, 5), dtype=np.int64)
    expected[[1, 3, 2, 2], [2, 2, 1, 3]] = 2
    expected[2, 2] = 1
    np.testing.assert_array_equal(region_map(centre()), expected)


def test_region_losses_by_hand() -> None:
    masks = torch.from_numpy(centre())[None, None]
    logits = torch.where(masks > 0, -2.0, 1.0)
    features = image_features(logits, masks, region_maps(masks.numpy()))
    np.testing.assert_allclose(features, [[2.126928, 1.313262]], atol=1e-6)


def test_ring_is_as_wide_as_the_object_is_deep() -> None:
    mask = np.zeros((21, 21))
    mask[8:13, 8:13] = 1  # depth 3
    regions = region_map(mask)
    assert (regions[mask == 1] == 1).all()
    assert regions[10, 15] == 2 and regions[10, 16] == 0  # 3 and 4 pixels outside
    assert (region_map(np.rot90(mask)) == np.rot90(regions)).all()


def test_inner_region_is_limited_by_the_room_outside() -> None:
    mask = np.ones((9, 9))
    mask[0, :] = 0  # the largest outside distance is 1
    regions = region_map(mask)
    assert (regions[1] == 1).all() and (regions[2:] == 0).all() and (regions[0] == 2).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_mask_without_boundary_is_undefined(value: float) -> None:
    mask = np.full((1, 1, 4, 4), value)
    regions = region_maps(mask)
    assert (regions == 0).all()
    assert np.isnan(image_features(torch.zeros(1, 1, 4, 4), torch.from_numpy(mask), regions)).all()


def test_site_mean_skips_undefined_images() -> None:
    rows = np.array([[1.0, 2.0, NAN, NAN], [3.0, 6.0, NAN, NAN], [NAN, NAN, NAN, NAN]])
    np.testing.assert_allclose(site_features(rows), [2.0, 4.0, NAN, NAN])
    assert np.isnan(site_features(np.zeros((0, 2)))).all()


def test_too_large_masks_raise_the_inner_loss() -> None:
    y, x = np.mgrid[:40, :40]
    distance = np.hypot(y - 20, x - 20)
    logits = torch.from_numpy(10.0 - distance)[None, None]  # a model that knows the true radius 10
    inner_minus_outer = []
    for radius in (7, 10, 13):
        mask = (distance < radius).astype(float)[None, None]
        row = image_features(logits, torch.from_numpy(mask), region_maps(mask))[0]
        inner_minus_outer.append(row[0] - row[1])
    assert inner_minus_outer[0] < inner_minus_outer[1] < inner_minus_outer[2]


def test_one_against_rest_logits() -> None:
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    binary = foreground_logits(logits, "softmax")
    torch.testing.assert_close(binary.sigmoid(), logits.softmax(dim=1)[:, 1:])
    torch.testing.assert_close(foreground_logits(logits[:, :2], "softmax"), logits[:, 1:2] - logits[:, :1])
    assert foreground_logits(logits, "sigmoid") is logits


def test_features_only_when_asked(new_client: Any) -> None:
    client = new_client(QualityFeatures, "segmentation")
    client.begin_round({"estimate_noise": False}, {})
    assert client.end_round() == ({}, {})
    client.begin_round({"estimate_noise": True}, {})
    arrays, metrics = client.end_round()
    assert set(metrics) == {"loss_in_0", "loss_out_0"} and all(np.isfinite(v) for v in metrics.values())
    client.check_leaves(arrays, metrics)


def test_features_are_those_of_the_received_model(new_client: Any) -> None:
    client = new_client(QualityFeatures, "segmentation")
    client.begin_round({"estimate_noise": True}, {})
    first = client.end_round()
    client.fit()
    assert client.end_round() == first
    split = client.train_set
    client.load_view("global")
    client.model.eval()
    batch = split.batch(torch.arange(len(split)))
    masks = batch.targets[:, None].double()
    with torch.no_grad():
        rows = image_features(client.model(batch.images).logits, masks, region_maps(masks.numpy()))
    np.testing.assert_allclose([first[1]["loss_in_0"], first[1]["loss_out_0"]], site_features(rows), rtol=1e-5)


def test_losses(new_client: Any) -> None:
    plain = new_client(QualityFeatures, "segmentation")
    mixed = new_client(QualityFeatures, "segmentation", args={"loss": "bce_dice", "bce_weight": 0.3})
    batch = next(iter(batches(plain.train_set, 4)))
    output = plain.model(batch.images)
    assert set(plain.loss(output, batch, 0)) == {"bce"}
    terms = mixed.loss(output, batch, 0)
    assert set(terms) == {"bce", "dice"}
    torch.testing.assert_close(sum(terms.values()), bce_dice(output.logits, batch.targets, 0.3))


def test_softmax_model_trains_on_the_same_loss(new_client: Any) -> None:
    client = new_client(QualityFeatures, "segmentation", activation="softmax")
    batch = next(iter(batches(client.train_set, 4)))
    output = client.model(batch.images)
    expected = torch.nn.functional.cross_entropy(output.logits, batch.targets)
    torch.testing.assert_close(client.loss(output, batch, 0)["bce"], expected)


@pytest.mark.parametrize("wrong", [{"loss": "dice"}, {"bce_weight": 1.2}])
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        QualityFeaturesParams(**wrong)
