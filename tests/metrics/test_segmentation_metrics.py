"""Dice and Hausdorff distance against MONAI, by hand, and where they are undefined."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from fedmed.metrics import dice_scores, evaluate_cases, hausdorff95, label_map, per_class, summarise


def _maps(n: int, classes: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (n, 4, 4), generator=rng)
    return coarse.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)


def test_dice_equals_monai() -> None:
    from monai.metrics import compute_dice

    predicted, reference = _maps(8, 3), _maps(8, 3, seed=1)
    predicted[0], reference[0] = 0, 0  # both empty
    predicted[1] = 0  # nothing predicted
    ids = torch.arange(3).view(1, -1, 1, 1)
    theirs = compute_dice(
        predicted.unsqueeze(1) == ids, reference.unsqueeze(1) == ids, include_background=False, ignore_empty=True
    )
    ours = dice_scores(predicted, reference, 3)
    assert ours[0].isnan().all()
    assert torch.equal(ours[1], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(ours, theirs.double(), equal_nan=True)


def test_dice_by_hand() -> None:
    predicted = torch.tensor([[[1, 1, 0, 2]]])
    reference = torch.tensor([[[1, 0, 0, 0]]])
    assert dice_scores(predicted, reference, 3).tolist()[0] == pytest.approx([2 / 3, 0.0])


def test_hausdorff_by_hand() -> None:
    predicted, reference = torch.zeros(3, 12, 12, dtype=torch.long), torch.zeros(3, 12, 12, dtype=torch.long)
    predicted[0, 2, 2], reference[0, 5, 6] = 1, 1  # two pixels, 3-4-5
    predicted[1, 2:6, 2:6], reference[1, 2:6, 2:6] = 1, 1  # equal
    predicted[2, 2, 2] = 1  # reference empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = hausdorff95(predicted, reference, 2)[:, 0].tolist()
    assert distance[:2] == [5.0, 0.0]
    assert math.isnan(distance[2])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # MONAI calls a deprecated argument of its own
def test_hausdorff_equals_monai_and_does_not_depend_on_direction() -> None:
    from monai.metrics import compute_hausdorff_distance

    predicted, reference = _maps(4, 3), _maps(4, 3, seed=1)
    ids = torch.arange(3).view(1, -1, 1, 1)
    theirs = compute_hausdorff_distance(predicted.unsqueeze(1) == ids, reference.unsqueeze(1) == ids, percentile=95)
    assert torch.allclose(hausdorff95(predicted, reference, 3), theirs.double())
    assert torch.equal(hausdorff95(predicted, reference, 3), hausdorff95(reference, predicted, 3))


def test_label_map_of_both_activations() -> None:
    foreground = torch.tensor([[[[0.6, 0.5, math.nan]]]])
    assert label_map(foreground, "sigmoid").tolist() == [[[1, 0, 0]]]
    several = torch.tensor([[[[0.6, 0.2, 0.9]], [[0.7, 0.4, 0.1]]]])
    assert label_map(several, "sigmoid").tolist() == [[[2, 0, 1]]]
    softmax = torch.tensor([[[[0.5, 0.1, math.nan]], [[0.2, 0.1, math.nan]], [[0.3, 0.8, math.nan]]]])
    assert label_map(softmax, "softmax").tolist() == [[[0, 2, 0]]]


def test_missed_and_empty_cases_are_counted_apart() -> None:
    prob, reference = torch.zeros(4, 1, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long)
    prob[0, 0, :2], reference[0, :2] = 1.0, 1  # hit
    reference[1, :2] = 1  # missed
    prob[2, 0, :2] = 1.0  # false alarm; case 3: empty on both sides
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases = evaluate_cases("segmentation", prob, reference, "sigmoid", 2, hd95=True)
        summary = summarise("segmentation", prob, reference, cases, ("background", "lesion"))
    assert [case["dice"] for case in cases[:3]] == [1.0, 0.0, 0.0]
    assert math.isnan(cases[3]["dice"])
    assert [case["missed"] for case in cases] == [0, 1, 1, 0]
    assert [case["both_empty"] for case in cases] == [0, 0, 0, 1]
    assert cases[0]["hd95"] == 0
    assert all(math.isnan(case["hd95"]) for case in cases[1:])
    assert summary == {
        "dice": pytest.approx(1 / 3),
        "hd95": 0.0,
        "missed_fraction": pytest.approx(2 / 3),
        "both_empty": 1.0,
    }


def test_mean_over_classes_leaves_the_undefined_ones_out() -> None:
    reference = torch.tensor([[[1, 1, 0, 0]], [[1, 2, 0, 0]]])
    prob = torch.nn.functional.one_hot(torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]]), 3).permute(0, 3, 1, 2).float()
    cases = evaluate_cases("segmentation", prob, reference, "softmax", 3)
    assert cases[0]["dice"] == 1.0  # class 2 is on neither side
    assert cases[1]["dice"] == 0.5
    assert "hd95" not in cases[0]
    names = ("background", "ring", "core")
    assert summarise("segmentation", None, None, cases, names)["dice"] == 0.75
    table = per_class("segmentation", None, None, cases, names)
    assert table["ring"] == {"dice": 1.0, "missed_fraction": 0.0, "both_empty": 0.0}
    assert table["core"] == {"dice": 0.0, "missed_fraction": 1.0, "both_empty": 1.0}


def test_no_cases_at_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prob, reference = torch.zeros(0, 1, 8, 8), torch.zeros(0, 8, 8, dtype=torch.long)
        cases = evaluate_cases("segmentation", prob, reference, "sigmoid", 2, hd95=True)
        summary = summarise("segmentation", prob, reference, cases, ("background", "lesion"))
    assert cases == []
    assert math.isnan(summary["dice"])
    assert math.isnan(summary["missed_fraction"])


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        evaluate_cases("segmentation", torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 4), "sigmoid", 2)
