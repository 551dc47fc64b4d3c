"""Classification scores against scikit-learn, by hand, and where they are undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fedmed.metrics import confusion_matrix, evaluate_cases, main_metric, per_class, summarise
from fedmed.schema import lower_is_better

NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _classified(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=rng).softmax(1), torch.randint(0, 4, (n,), generator=rng)


def _summary(probs: torch.Tensor, labels: torch.Tensor, task: str = "classification") -> dict[str, float]:
    activation = "softmax" if task == "classification" else "sigmoid"
    cases = evaluate_cases(task, probs, labels, activation, probs.shape[1])
    return summarise(task, probs, labels, cases, NAMES[: probs.shape[1]])


def test_equals_scikit_learn() -> None:
    probs, labels = _classified()
    got, predicted = _summary(probs, labels), probs.argmax(1)
    assert got["acc"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert got["bacc"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert got["f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    one_hot = np.eye(4)[labels]
    assert got["auc"] == pytest.approx(sk.roc_auc_score(one_hot, probs.double().numpy(), average="macro"))
    expected = sk.confusion_matrix(labels, predicted)
    assert (confusion_matrix(labels.numpy(), predicted.numpy(), 4) == expected).all()


def test_by_hand_with_an_absent_class() -> None:
    # References 0 0 1 1, predictions 0 0 1 2; class 3 occurs nowhere, class 2 is only predicted.
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]])
    labels = torch.tensor([0, 0, 1, 1])
    got = _summary(probs, labels)
    assert got["acc"] == 0.75
    assert got["bacc"] == 0.75  # mean of 1 and 1/2
    assert got["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert got["auc"] == pytest.approx((1 + 0.875) / 2)
    cases = evaluate_cases("classification", probs, labels, "softmax", 4)
    assert cases[3] == {"label": 1.0, "predicted": 2.0, "correct": 0.0, "prob_true": pytest.approx(0.2)}
    table = per_class("classification", probs, labels, cases, NAMES)
    assert table["b"]["recall"] == 0.5
    assert table["b"]["count"] == 2
    assert math.isnan(table["c"]["recall"])
    assert math.isnan(table["d"]["f1"])
    assert math.isnan(table["d"]["auc"])


def test_undefined_is_nan_never_zero() -> None:
    one_class = _summary(_classified(5)[0], torch.zeros(5, dtype=torch.long))
    assert math.isnan(one_class["auc"])
    nothing = _summary(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert set(nothing) == {"acc", "bacc", "auc", "f1"}
    assert all(math.isnan(value) for value in nothing.values())


def test_a_diverged_model_is_wrong_not_an_error() -> None:
    probs, labels = _classified(20)
    got = _summary(torch.full_like(probs, math.nan), labels)
    assert got["acc"] == 0
    assert got["bacc"] == 0
    assert math.isnan(got["auc"])


def test_order_of_the_cases_does_not_matter() -> None:
    probs, labels = _classified()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert _summary(probs[order], labels[order]) == pytest.approx(_summary(probs, labels))


def test_multilabel_equals_scikit_learn() -> None:
    rng = torch.Generator().manual_seed(0)
    probs, truth = torch.rand(50, 3, generator=rng), (torch.rand(50, 3, generator=rng) > 0.6).float()
    got = _summary(probs, truth, "multilabel")
    assert got["auc"] == pytest.approx(sk.roc_auc_score(truth, probs, average="macro"))
    assert got["map"] == pytest.approx(sk.average_precision_score(truth, probs, average="macro"))
    assert got["f1"] == pytest.approx(sk.f1_score(truth, probs > 0.5, average="macro"))
    assert set(got) == {"auc", "map", "f1"}


def test_multilabel_leaves_unknown_labels_and_single_outcomes_out() -> None:
    probs = torch.tensor([[0.9, 0.1, 0.2], [0.2, 0.6, 0.3], [0.7, 0.2, 0.4]])
    truth = torch.tensor([[1.0, 0.0, math.nan], [0.0, 0.0, 1.0], [-1.0, 0.0, math.nan]])
    got = _summary(probs, truth, "multilabel")
    assert got["auc"] == 1.0  # only the first label has both outcomes
    assert got["map"] == 1.0
    assert got["f1"] == pytest.approx((1 + 0 + 0) / 3)
    cases = evaluate_cases("multilabel", probs, truth, "sigmoid", 3)
    assert cases[0]["correct"] == 1.0
    assert math.isnan(cases[0]["label_2"])
    assert per_class("multilabel", probs, truth, cases, NAMES[:3])["a"]["count"] == 1


def test_main_metric_and_direction() -> None:
    assert [main_metric(task) for task in ("segmentation", "classification", "multilabel")] == ["dice", "bacc", "auc"]
    assert not lower_is_better("test/global/dice")
    assert lower_is_better("test/global/hd95")
