"""Per-case records, their summary, and values per class: what an evaluation reports for each of the three tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmed.metrics import classification as cls
from fedmed.metrics.segmentation import known_mean, label_map, segmentation_cases

Cases = list[dict[str, float]]

_MAIN = {"segmentation": "dice", "classification": "bacc", "multilabel": "auc"}
_EVERY_ROUND = {
    "segmentation": ("dice", "missed_fraction"),
    "classification": ("acc", "bacc", "auc", "f1"),
    "multilabel": ("auc", "map", "f1"),
}


def main_metric(task: str) -> str:
    """The metric a task is judged by: segmentation dice, classification bacc, multilabel auc."""
    return _MAIN[task]


def round_metrics(task: str) -> tuple[str, ...]:
    """The metrics of `summarise` that every evaluation of a task has and a round can be chosen by (hd95 is only measured in the last)."""
    return _EVERY_ROUND[task]


def evaluate_cases(
    task: str, probs: Tensor, targets: Tensor, activation: str, num_classes: int, hd95: bool = False
) -> Cases:
    """One record of floats per case, in order.

    segmentation: probs (N, C or F, H, W), targets (N, H, W) class ids -> see `segmentation_cases` (dice, hd95 in
    pixels, missed, ...). classification: probs (N, C), targets (N,) -> label, predicted (-1: none), correct, prob_true
    (of the reference class). multilabel: probs (N, L), targets (N, L), below 0 or NaN = unknown -> label_<l>, prob_<l>,
    and correct, the share of known labels on the right side of 0.5.
    """
    if task == "segmentation":
        return segmentation_cases(label_map(probs, activation), targets.to(probs.device), num_classes, hd95)
    values, truth = _floats(probs), _floats(targets)
    if task == "classification":
        return _classification_cases(values, truth.astype(np.int64))
    return _multilabel_cases(values, truth)


def _classification_cases(values: NDArray[np.float64], labels: NDArray[np.int64]) -> Cases:
    predicted = cls.predicted_class(values)
    true_prob = values[np.arange(len(labels)), labels]
    return [
        {"label": float(label), "predicted": float(guess), "correct": float(label == guess), "prob_true": float(prob)}
        for label, guess, prob in zip(labels, predicted, true_prob, strict=True)
    ]


def _multilabel_cases(values: NDArray[np.float64], truth: NDArray[np.float64]) -> Cases:
    known = truth >= 0
    right = known & ((values > 0.5) == (truth > 0.5)) & np.isfinite(values)
    records: Cases = []
    for case in range(len(values)):
        count = int(known[case].sum())
        record = {"correct": float(right[case].sum() / count) if count else float("nan")}
        for label in range(values.shape[1]):
            record[f"label_{label}"] = float(truth[case, label]) if known[case, label] else float("nan")
            record[f"prob_{label}"] = float(values[case, label])
        records.append(record)
    return records


def summarise(
    task: str,
    probs: Tensor | None,
    targets: Tensor | None,
    cases: Sequence[Mapping[str, float]],
    class_names: Sequence[str],
) -> dict[str, float]:
    """Metrics over all cases; NaN = undefined.

    segmentation (from `cases` alone, so probs and targets may be None): dice, mean over the cases where it is defined;
    missed_fraction, share of (case, class) pairs with exactly one of prediction and reference empty, among those not
    both empty; both_empty, the number of the others; hd95 (pixels, mean of the defined ones) when the cases hold it.
    classification: acc; bacc, mean recall over the classes present; auc, macro one-versus-rest over the classes with
    both outcomes; f1, macro over the classes labelled or predicted. multilabel: auc, map (mean average precision), f1
    (at 0.5), macro.
    """
    if task == "segmentation":
        return _summarise_segmentation(cases, len(class_names) - 1)
    if probs is None or targets is None:
        raise ValueError(f"task {task} needs probs and targets")
    table = _class_table(task, _floats(probs), _floats(targets), len(class_names))
    result = {name: known_mean(values) for name, values in table.items() if name not in ("recall", "count")}
    if task == "classification":
        correct = np.array([case["correct"] for case in cases], dtype=np.float64)
        result = {"acc": known_mean(correct), "bacc": known_mean(table["recall"]), **result}
    return result


def _summarise_segmentation(cases: Sequence[Mapping[str, float]], num_foreground: int) -> dict[str, float]:
    def column(name: str) -> NDArray[np.float64]:
        return np.array([case[name] for case in cases], dtype=np.float64)

    missed, both_empty = column("missed").sum(), column("both_empty").sum()
    judged = len(cases) * num_foreground - both_empty
    result = {"dice": known_mean(column("dice"))}
    if cases and "hd95" in cases[0]:
        result["hd95"] = known_mean(column("hd95"))
    result["missed_fraction"] = float(missed / judged) if judged else float("nan")
    result["both_empty"] = float(both_empty)
    return result


def _class_table(
    task: str, values: NDArray[np.float64], truth: NDArray[np.float64], num_classes: int
) -> dict[str, NDArray[np.float64]]:
    """Metric -> (C,) values per class for the two classification tasks."""
    if task == "multilabel":
        return {
            "auc": cls.rank_scores(truth, values),
            "map": cls.rank_scores(truth, values, precision=True),
            "f1": cls.label_f1(truth, values),
            "count": (truth > 0.5).sum(axis=0).astype(np.float64),
        }
    labels = truth.astype(np.int64)
    predicted = cls.predicted_class(values)
    return {
        "recall": cls.class_recall(labels, predicted, num_classes),
        "auc": cls.rank_scores(cls.one_hot(labels, num_classes), values),
        "f1": cls.class_f1(labels, predicted, num_classes),
        "count": np.bincount(labels, minlength=num_classes).astype(np.float64),
    }


def per_class(
    task: str,
    probs: Tensor | None,
    targets: Tensor | None,
    cases: Sequence[Mapping[str, float]],
    class_names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Class name -> metric -> value; NaN = undefined. Arguments as in `summarise`.

    segmentation, foreground classes: dice, missed_fraction, both_empty, hd95 when measured. classification: recall,
    auc, f1, count (of reference labels). multilabel: auc, map, f1, count (of positives).
    """
    if task == "segmentation":
        result = {}
        for place, name in enumerate(class_names[1:], start=1):
            wanted = ("dice", "hd95", "missed", "both_empty")
            own = [{key: case[f"{key}_{place}"] for key in wanted if f"{key}_{place}" in case} for case in cases]
            result[name] = _summarise_segmentation(own, 1)
        return result
    if probs is None or targets is None:
        raise ValueError(f"task {task} needs probs and targets")
    table = _class_table(task, _floats(probs), _floats(targets), len(class_names))
    return {
        name: {key: float(values[place]) for key, values in table.items()} for place, name in enumerate(class_names)
    }


def _floats(values: Tensor) -> NDArray[np.float64]:
    result: NDArray[Any] = values.detach().double().cpu().numpy()
    return result
