"""From a task to an activation, to the number of model outputs, and from logits to probabilities."""

from __future__ import annotations

from torch import Tensor

from fedmed.errors import UserError
from fedmed.metrics.segmentation import label_map

__all__ = ["ACTIVATIONS", "TASKS", "label_map", "num_outputs", "probabilities", "resolve_activation"]

TASKS = ("segmentation", "classification", "multilabel")
ACTIVATIONS = ("softmax", "sigmoid")
_ONLY = {"classification": "softmax", "multilabel": "sigmoid"}


def resolve_activation(task: str, num_classes: int, activation: str = "auto") -> str:
    """Give "softmax" or "sigmoid" for a task; checks that the two go together.

    "auto": softmax for classification, sigmoid for multilabel; segmentation: sigmoid with one foreground class
    (`num_classes` 2, background included), else softmax. Raises `UserError` for an unknown task or activation and for a
    pair that makes no sense.
    """
    if task not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if activation not in ("auto", *ACTIVATIONS):
        raise UserError(f"model.activation: expected auto, softmax or sigmoid, got {activation!r}")
    if task == "segmentation":
        if num_classes < 2:
            raise UserError(f"segmentation: expected background and at least one class, got {num_classes} classes")
        return activation if activation != "auto" else ("sigmoid" if num_classes == 2 else "softmax")
    if activation not in ("auto", _ONLY[task]):
        raise UserError(f"model.activation: task {task} needs {_ONLY[task]}, got {activation}; use auto")
    return _ONLY[task]


def num_outputs(task: str, num_classes: int, activation: str = "auto") -> int:
    """Number of logits (per pixel for segmentation): `num_classes`, less the background where segmentation uses
    sigmoid.
    """
    resolved = resolve_activation(task, num_classes, activation)
    return num_classes - 1 if task == "segmentation" and resolved == "sigmoid" else num_classes


def probabilities(logits: Tensor, activation: str) -> Tensor:
    """Probabilities in [0, 1] of the same shape as logits (B, C) or (B, C, H, W): softmax over axis 1, or sigmoid of
    each entry.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be softmax or sigmoid, got {activation!r}")
    return logits.softmax(dim=1) if activation == "softmax" else logits.sigmoid()
