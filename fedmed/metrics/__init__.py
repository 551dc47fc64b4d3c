"""Metrics per case and over cases. Undefined is NaN, never 0."""

from fedmed.metrics.classification import confusion_matrix, predicted_class
from fedmed.metrics.segmentation import dice_scores, hausdorff95, label_map
from fedmed.metrics.summary import evaluate_cases, main_metric, per_class, round_metrics, summarise

__all__ = [
    "confusion_matrix",
    "dice_scores",
    "evaluate_cases",
    "hausdorff95",
    "label_map",
    "main_metric",
    "per_class",
    "predicted_class",
    "round_metrics",
    "summarise",
]
