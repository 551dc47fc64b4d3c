"""FedIA at the site: component counts, completed masks, and what is kept of them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.annotation_completion import (
    ADDED,
    AnnotationCompletion,
    AnnotationCompletionParams,
    additions,
    complete,
    completeness,
    component_ratios,
    image_components,
    mean_defined,
    pack,
    pooled_completeness,
    unpack,
    volume_components,
)
from fedmed.data.loader import batches
from fedmed.errors import UserError
from fedmed.losses.segmentation import dice
from fedmed.models.output import Output

NAN = float("nan")
ASK = {"measure": 1, "correct": 1, "threshold": 0.5}


# ---------------------------------------------------------------------- completeness


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def naive_components(mask: np.ndarray) -> int:
    """Flood fill over edge neighbours."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        count, stack = count + 1, [left.pop()]
        while stack:
            place = stack.pop()
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    near = tuple(x + step * (i == axis) for i, x in enumerate(place))
                    if near in left:
                        left.remove(near)
                        stack.append(near)
    return count


def test_corner_neighbours_are_two_components() -> None:
    assert image_components(np.array([[[1, 0], [0, 1]], [[1, 1], [0, 1]], [[0, 0], [0, 0]]])).tolist() == [2, 1, 0]


def test_components_match_a_flood_fill() -> None:
    masks = np.random.default_rng(0).random((4, 9, 11)) > 0.6
    assert image_components(masks).tolist() == [naive_components(mask) for mask in masks]
    assert volume_components(masks) == naive_components(masks)


def test_a_volume_joins_lesions_of_unrelated_images() -> None:
    masks = np.zeros((3, 4, 4), dtype=np.uint8)
    masks[:, 1, 1] = 1
    assert volume_components(masks) == 1 and image_components(masks).sum() == 3


def test_completeness_by_hand() -> None:
    assert pooled_completeness(ints(2), ints(4)) == 0.5
    ratios = component_ratios(ints(1, 1, 2, 0), ints(2, 0, 2, 3))
    np.testing.assert_allclose(ratios, [0.5, NAN, 1.0, 0.0])
    assert mean_defined(ratios[:3]) == 0.75


def test_completeness_at_the_edges() -> None:
    assert pooled_completeness(ints(3, 2), ints(0, 0)) == 1.0 and mean_defined(np.array([NAN, NAN])) == 1.0
    assert pooled_completeness(ints(0, 0), ints(1, 0)) == 0.0 and pooled_completeness(ints(9), ints(3)) == 1.0
    assert pooled_completeness(ints(), ints()) == 1.0 and mean_defined(np.array([])) == 1.0
    nothing = np.zeros((0, 4, 4), dtype=bool)
    assert completeness(nothing, nothing) == completeness(nothing, nothing, "batch3d", 2) == 1.0
    assert volume_components(nothing) == 0 and image_components(nothing).tolist() == []


def test_modes_differ_where_images_lie_on_one_another() -> None:
    annotated, predicted = np.zeros((2, 2, 5, 5), dtype=bool)
    annotated[0, 1, 1] = True
    predicted[:, 1, 1] = predicted[0, 3, 3] = True
    assert completeness(annotated, predicted) == pytest.approx(1 / 3)
    assert completeness(annotated, predicted, "batch3d", 2) == 0.5
    assert completeness(annotated, predicted, "batch3d", 1) == pytest.approx((0.5 + 0.0) / 2)
    assert completeness(predicted, annotated, "batch3d", 2) == 1.0  # clipped
    order = [1, 0]
    assert completeness(annotated[order], predicted[order]) == completeness(annotated, predicted)


# ---------------------------------------------------------------------- correction


def test_correction_by_hand() -> None:
    lesion = torch.tensor([[[0.85, 0.80, 0.55, 0.1]]], dtype=torch.float64)
    labels = torch.tensor([[[0, 0, 0, 1]]], dtype=torch.uint8)
    added = additions(torch.stack([1 - lesion, lesion], dim=1), labels, 0.8)
    assert added.tolist() == [[[True, False, False, False]]]
    done = complete(labels, added)
    assert done.tolist() == [[[1, 0, 0, 1]]] and done.dtype == torch.uint8 and int(labels.sum()) == 1


def test_a_low_threshold_still_needs_the_larger_probability() -> None:
    lesion = torch.tensor([[[0.4, 0.5, 0.6]]])
    added = additions(torch.stack([1 - lesion, lesion], dim=1), torch.zeros(1, 1, 3), 0.0)
    assert added.tolist() == [[[False, False, True]]]


def test_correction_only_adds_and_a_second_one_of_the_same_model_adds_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    prob = torch.randn(3, 2, 8, 8, generator=rng).softmax(dim=1)
    labels = torch.randint(0, 2, (3, 8, 8), generator=rng)
    done = complete(labels, additions(prob, labels, 0.6))
    assert bool((done >= labels).all()) and int((done > labels).sum()) > 0
    assert not additions(prob, done, 0.6).any()


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 4), (0, 3, 3)])
def test_bits_come_back(shape: tuple[int, int, int]) -> None:
    masks = np.random.default_rng(0).random(shape) > 0.5
    bits = pack(masks)
    assert bits.dtype == torch.uint8 and tuple(bits.shape) == (shape[0], -(-shape[1] * shape[2] // 8))
    np.testing.assert_array_equal(unpack(bits, shape), masks)
    with pytest.raises(ValueError, match="expected bits"):
        unpack(bits, (shape[0] + 1, *shape[1:]))


# ---------------------------------------------------------------------- client


class Bright(nn.Module):
    """Takes for lesion what is brighter than `cut` (mean over channels)."""

    def __init__(self, cut: float) -> None:
        super().__init__()
        self.cut = nn.Parameter(torch.tensor(cut))

    def forward(self, images: Tensor) -> Output:
        """Logits (B, 2, H, W)."""
        score = 50 * (images.mean(dim=1) - self.cut)
        return Output(torch.stack([-score, score], dim=1))


@pytest.fixture
def client(new_client: Any) -> Any:
    made = new_client(AnnotationCompletion, "segmentation", activation="softmax")
    images = made.train_set.batch(torch.arange(len(made.train_set))).images
    made.model = Bright(float(images.mean()))
    return made


def again(client: Any, new_client: Any, personal: dict[str, Tensor] | None = None) -> Any:
    """The same site in another round, with what it kept."""
    made = new_client(AnnotationCompletion, "segmentation", activation="softmax")
    made.model, made.personal = client.model, dict(client.personal) if personal is None else personal
    return made


def whole(split: Any) -> Any:
    return split.batch(torch.arange(len(split)))


def test_nothing_is_done_unasked(client: Any) -> None:
    before = client.train_set
    client.begin_round({"measure": 0, "correct": 0, "threshold": 0.8}, {})
    assert client.train_set is before and client.end_round() == ({}, {"n_corrected_pixels": 0})
    assert ADDED not in client.personal


def test_what_is_sent_is_declared(client: Any) -> None:
    client.begin_round(ASK, {})
    arrays, metrics = client.end_round()
    assert arrays == {} and set(metrics) == {"completeness", "n_corrected_pixels"}
    assert isinstance(metrics["n_corrected_pixels"], int) and 0 <= metrics["completeness"] <= 1
    client.check_leaves(arrays, metrics)


@pytest.mark.parametrize("mode", ["pooled2d", "batch3d"])
def test_completeness_is_of_the_received_model_on_the_masks_of_the_site(
    new_client: Any, client: Any, mode: str
) -> None:
    made = new_client(AnnotationCompletion, "segmentation", activation="softmax", args={"mode": mode})
    made.model = client.model
    batch = whole(made.train_set)
    expected = completeness(
        batch.targets.numpy() == 1, (made.model(batch.images).logits.argmax(dim=1) == 1).numpy(), mode, 4
    )
    made.begin_round({"measure": 1, "correct": 1, "threshold": 0.5}, {})  # the correction must not enter it
    assert made.end_round()[1]["completeness"] == expected
    assert 0 < expected < 1


def test_masks_are_completed_for_training_only(client: Any) -> None:
    given = client.train_set
    batch = whole(given)
    prob = client.model(batch.images).logits.softmax(dim=1)
    expected = (batch.targets == 0) & (prob[:, 1] > 0.5)
    client.begin_round({"correct": 1, "threshold": 0.5}, {})
    assert torch.equal(whole(client.train_set).targets, batch.targets + expected)
    assert client.train_set.targets.dtype == given.targets.dtype
    assert client.end_round() == ({}, {"n_corrected_pixels": int(expected.sum())}) and int(expected.sum()) > 0
    assert torch.equal(whole(client.data.split("train", client.device)).targets, batch.targets)


def test_added_pixels_stay_and_what_is_kept_is_bits(client: Any, new_client: Any) -> None:
    client.begin_round({"correct": 1, "threshold": 0.5}, {})
    completed, bits = client.train_set.targets, client.personal[ADDED]
    assert bits.dtype == torch.uint8 and bits.numel() * 8 == completed.numel()
    later = again(client, new_client)
    later.model = Bright(9.0)  # a model that sees nothing takes nothing back
    later.begin_round({"correct": 0}, {})
    assert torch.equal(later.train_set.targets, completed)
    assert later.end_round() == client.end_round()
    more = again(client, new_client)
    more.begin_round({"correct": 1, "threshold": 0.5}, {})
    assert torch.equal(more.train_set.targets, completed)


def test_a_reply_that_was_not_accepted_is_corrected_again(client: Any, new_client: Any) -> None:
    client.begin_round({}, {})
    before = dict(client.personal)
    client.begin_round({"correct": 1, "threshold": 0.5}, {})
    rolled_back = again(client, new_client, before)
    rolled_back.begin_round({}, {})
    assert rolled_back.num_added == 0
    rolled_back.begin_round({"correct": 1, "threshold": 0.5}, {})
    assert torch.equal(rolled_back.train_set.targets, client.train_set.targets)


def change_masks(split: Any) -> Any:
    targets = split.targets.clone()
    targets[0, 0, 0] ^= 1
    return split.with_targets(targets)


@pytest.mark.parametrize(
    "change", [change_masks, lambda s: s.subset(torch.arange(3)), lambda s: s.subset(torch.arange(len(s)).flip(0))]
)
def test_another_site_file_starts_anew_and_says_so(
    client: Any, new_client: Any, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    client.begin_round({"correct": 1, "threshold": 0.5}, {})
    other = again(client, new_client)
    other.train_set = change(other.train_set)
    with caplog.at_level(logging.WARNING):
        other.begin_round({}, {})
    assert other.num_added == 0 and ADDED not in other.personal and "added pixels are dropped" in caplog.text
    caplog.clear()
    next_round = again(other, new_client)
    next_round.train_set = change(next_round.train_set)
    next_round.begin_round({}, {})
    assert caplog.text == ""


def test_loss_is_the_released_dice(client: Any, new_client: Any) -> None:
    batch = next(iter(batches(client.train_set, 4)))
    batch.targets[0] = 0
    output = client.model(batch.images)
    torch.testing.assert_close(client.loss(output, batch, 0), {"dice": dice(output.logits, batch.targets)})
    other = new_client(AnnotationCompletion, "segmentation", activation="softmax", args={"skip_empty": True})
    expected = dice(output.logits[1:], batch.targets[1:])
    torch.testing.assert_close(other.loss(output, batch, 0), {"dice": expected})


def test_training_sees_the_added_pixels(client: Any) -> None:
    seen = []
    client.begin_round({"correct": 1, "threshold": 0.5}, {})
    original = client.loss
    client.loss = lambda output, batch, step: seen.append(int(batch.targets.sum())) or original(output, batch, step)
    client.fit()
    assert sum(seen) == int(client.train_set.targets.long().sum()) * client.config.training.epochs


def test_what_is_no_softmax_of_one_class_is_refused(new_client: Any, client: Any) -> None:
    with pytest.raises(UserError, match=r"set model\.activation=softmax"):
        new_client(AnnotationCompletion, "segmentation", activation="sigmoid").begin_round({}, {})
    client.data = type("Data", (), {"classes": ("background", "oedema", "core"), "label_kind": "mask"})()
    with pytest.raises(UserError, match="this site has oedema, core"):
        client.begin_round({}, {})


@pytest.mark.parametrize("wrong", [{"loss": "ce_dice"}, {"mode": "2d"}])
def test_values_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AnnotationCompletionParams(**wrong)
