"""Scores of single-label and multi-label classification.

N examples, C classes, L labels. NaN = undefined (a class without examples, one outcome only), never 0, and never a
warning. An example with a non-finite probability counts as wrong; a ranking score of such a column is undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_PREDICTION = -1


def predicted_class(probs: Floats) -> Ints:
    """Most probable class (N,) of probs (N, C); `NO_PREDICTION` where a probability is not finite."""
    if probs.shape[0] == 0:
        return np.zeros(0, dtype=np.int64)
    return np.where(np.isfinite(probs).all(axis=1), probs.argmax(axis=1), NO_PREDICTION).astype(np.int64)


def confusion_matrix(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """Counts (C, C), row = reference class, column = predicted class. labels, predicted (N,); examples without a
    prediction are left out.
    """
    used = predicted >= 0
    pairs = labels[used] * num_classes + predicted[used]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    """Divide two arrays of one shape, NaN where below is 0."""
    result: Floats = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
    return result


def class_recall(labels: Ints, predicted: Ints, num_classes: int) -> Floats:
    """Recall (C,) per class, NaN for a class that no reference label names."""
    hits = np.diagonal(confusion_matrix(labels, predicted, num_classes))
    return _ratio(hits, np.bincount(labels, minlength=num_classes))


def class_f1(labels: Ints, predicted: Ints, num_classes: int) -> Floats:
    """F1 = 2 TP / (labelled + predicted) per class, NaN for a class neither labelled nor predicted."""
    confusion = confusion_matrix(labels, predicted, num_classes)
    return _ratio(2.0 * np.diagonal(confusion), np.bincount(labels, minlength=num_classes) + confusion.sum(axis=0))


def label_f1(truth: Floats, probs: Floats, threshold: float = 0.5) -> Floats:
    """F1 (L,) of 0/1 truth (N, L) and probs (N, L) > threshold; entries of truth below 0 or NaN are unknown and left
    out.
    """
    known = truth >= 0
    positive, called = known & (truth > 0.5), known & (probs > threshold)
    return _ratio(2.0 * (positive & called).sum(axis=0), positive.sum(axis=0) + called.sum(axis=0))


def rank_scores(truth: Floats, probs: Floats, *, precision: bool = False) -> Floats:
    """Area under the ROC curve (L,) per column, or average precision; NaN for a column with one outcome only.

    truth (N, L) of 0/1, below 0 or NaN = unknown and left out; probs (N, L). Ties count half (ROC).
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # scikit-learn takes a second to import

    score = average_precision_score if precision else roc_auc_score
    result = np.full(truth.shape[1], np.nan)
    for column in range(truth.shape[1]):
        known = truth[:, column] >= 0
        positive, value = truth[known, column] > 0.5, probs[known, column]
        if positive.any() and not positive.all() and np.isfinite(value).all():
            result[column] = score(positive, value)
    return result


def one_hot(labels: Ints, num_classes: int) -> Floats:
    """0/1 table (N, C) of class ids (N,)."""
    table: Floats = (labels[:, None] == np.arange(num_classes)).astype(np.float64)
    return table
