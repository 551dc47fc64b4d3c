"""Tasks, activations, numbers of outputs."""

from __future__ import annotations

import pytest
import torch

from fedmed.errors import UserError
from fedmed.models.heads import label_map, num_outputs, probabilities, resolve_activation


@pytest.mark.parametrize(
    ("task", "classes", "wanted", "activation", "outputs"),
    [
        ("classification", 7, "auto", "softmax", 7),
        ("multilabel", 5, "auto", "sigmoid", 5),
        ("segmentation", 2, "auto", "sigmoid", 1),
        ("segmentation", 2, "softmax", "softmax", 2),
        ("segmentation", 4, "auto", "softmax", 4),
        ("segmentation", 4, "sigmoid", "sigmoid", 3),
    ],
)
def test_activation_and_outputs(task: str, classes: int, wanted: str, activation: str, outputs: int) -> None:
    assert resolve_activation(task, classes, wanted) == activation
    assert num_outputs(task, classes, wanted) == num_outputs(task, classes, activation) == outputs


@pytest.mark.parametrize(
    ("task", "classes", "activation"),
    [
        ("classification", 3, "sigmoid"),
        ("multilabel", 3, "softmax"),
        ("segmentation", 1, "auto"),
        ("segmentation", 2, "tanh"),
        ("regression", 2, "auto"),
    ],
)
def test_pairs_without_meaning_are_refused(task: str, classes: int, activation: str) -> None:
    with pytest.raises(UserError):
        num_outputs(task, classes, activation)


def test_probabilities() -> None:
    logits = torch.zeros(2, 4, 3, 3)
    assert (probabilities(logits, "softmax") == 0.25).all()
    assert (probabilities(logits, "sigmoid") == 0.5).all()
    assert (label_map(probabilities(logits, "sigmoid"), "sigmoid") == 0).all()
    with pytest.raises(ValueError, match="softmax or sigmoid"):
        probabilities(logits, "auto")
