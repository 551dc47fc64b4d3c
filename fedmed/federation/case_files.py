"""What a site writes down about single test items for its own eyes: a few example cases and the confusion counts.

Letters: n chosen cases, C classes, H W pixels. Everything here is computed once, after the last evaluation, from the view that
judges; nothing is sent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.data.loader import batches
from fedmed.data.split import Batch
from fedmed.federation.client import Client
from fedmed.metrics.classification import confusion_matrix
from fedmed.models.heads import label_map

OVERLAY, EXAMPLES, CONFUSION = "overlay.npz", "examples.npz", "confusion.json"
RANKS = ("best", "median", "worst")
# What a case is judged by; multilabel: the share of its known labels on the right side of 0.5.
_SCORE = {"segmentation": "dice", "classification": "prob_true", "multilabel": "correct"}
Arrays = dict[str, np.ndarray[Any, Any]]
Cases = Sequence[Mapping[str, Any]]


def pick_cases(task: str, cases: Cases) -> dict[str, int]:
    """Places of the best, the median and the worst case by the judging score of a task, by the words of `RANKS`.

    Undefined scores are left out (if all are, the first case is given as "median"), of equal scores the first case is the
    better one, and of an even number the lower middle one is the median. No case has two places: two cases are best and worst,
    a single one is the median.
    """
    scores = [float(case[_SCORE[task]]) for case in cases]
    order = sorted((i for i, v in enumerate(scores) if math.isfinite(v)), key=lambda i: (-scores[i], i))
    if len(order) < 2:
        return {"median": order[0] if order else 0} if cases else {}
    median = {"median": order[len(order) // 2]} if len(order) > 2 else {}
    return {"best": order[0], **median, "worst": order[-1]}


@contextmanager
def evaluating(client: Client) -> Iterator[None]:
    """The model in eval mode and no gradients; its mode is put back at the end."""
    was_training = client.model.training
    client.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        client.model.train(was_training)


def predict(client: Client, batch: Batch, view: str) -> Tensor:
    """Probabilities of a batch, float32, in the precision of the run."""
    with client.autocast():
        return client.predict(batch, view).float()


def known_targets(client: Client, batch: Batch) -> Tensor:
    """The targets of a batch; of multi-label items NaN, unknown, where a class is not annotated for an item."""
    active = client.data.annotated(batch) if client.data.task == "multilabel" else None
    return batch.targets if active is None else batch.targets.masked_fill(~active, float("nan"))


def example_arrays(client: Client, split: str, view: str, cases: Cases) -> Arrays:
    """Arrays of the chosen cases: their items are predicted again, since evaluation has no randomness.

    The view is loaded, `cases` are those of the whole split in its order. Out: `rank` (n,) text, `score` (n,), `image` (n, H, W, C)
    uint8, each image scaled to its own range; segmentation: `reference`, `prediction` (n, H, W) uint8 and `dice`, the scores
    again; else `classes` (C,) text, `probability` (n, C) and `truth`, (n,) class ids or (n, C) with NaN for unknown. {} without
    cases. No name of an item is in it.
    """
    task = client.data.task
    chosen = pick_cases(task, cases)
    if not chosen:
        return {}
    batch = client.data.split(split, client.device).batch(torch.tensor(list(chosen.values())))
    with evaluating(client):
        prob = predict(client, batch, view)
    scores = np.array([float(cases[i][_SCORE[task]]) for i in chosen.values()])
    found: Arrays = {"rank": np.array(list(chosen)), "score": scores, "image": _bytes(batch.images)}
    if task == "segmentation":
        predicted = label_map(prob, client.activation).to(torch.uint8)
        reference = batch.targets.to(torch.uint8)
        return {**found, "reference": reference.cpu().numpy(), "prediction": predicted.cpu().numpy(), "dice": scores}
    truth = known_targets(client, batch).cpu().numpy()
    return {
        **found,
        "classes": np.array(client.data.classes),
        "probability": prob.cpu().numpy(),
        "truth": truth.astype(np.int64) if task == "classification" else truth.astype(np.float32),
    }


def _bytes(images: Tensor) -> np.ndarray[Any, Any]:
    """Decoded images (n, C, H, W) as (n, H, W, C) uint8, each scaled to its own range (a flat one is black)."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp_min(1e-6) * 255).byte()
    result: np.ndarray[Any, Any] = shown.permute(0, 2, 3, 1).cpu().numpy()
    return result


def confusion(client: Client, split: str, view: str, cases: Cases) -> dict[str, Any]:
    """Counts of reference against prediction over a split, as JSON-ready values; the view is loaded.

    counts: (C, C), row = reference, column = prediction, of cases or (segmentation) of pixels; multilabel: (C, 2, 2), one table
    per class, row and column 0 = absent, 1 = present (above 0.5). Unknown labels, pixels that are not annotated and cases without a
    prediction are left out. Segmentation takes one more pass over the split: counting in every round would cost every round.
    """
    task, classes = client.data.task, client.data.classes
    if task == "segmentation":
        counts = _pixels(client, split, view, len(classes))
    elif task == "classification":
        pairs = np.array([(case["label"], case["predicted"]) for case in cases], dtype=np.int64).reshape(-1, 2)
        counts = confusion_matrix(pairs[:, 0], pairs[:, 1], len(classes))
    else:
        counts = np.stack([_two_by_two(cases, place) for place in range(len(classes))])
    unit = "pixels" if task == "segmentation" else "cases"
    return {
        "task": task, "split": split, "view": view, "unit": unit, "classes": list(classes), "counts": counts.tolist(),
    }  # fmt: skip


def _two_by_two(cases: Cases, place: int) -> np.ndarray[Any, Any]:
    pairs = np.array([(case[f"label_{place}"], case[f"prob_{place}"]) for case in cases], dtype=np.float64)
    known = pairs.reshape(-1, 2)[np.isfinite(pairs.reshape(-1, 2)).all(axis=1)]
    return confusion_matrix((known[:, 0] > 0.5).astype(np.int64), (known[:, 1] > 0.5).astype(np.int64), 2)


def _pixels(client: Client, split: str, view: str, num_classes: int) -> np.ndarray[Any, Any]:
    counts = torch.zeros(num_classes**2, dtype=torch.int64)
    with evaluating(client):
        for batch in batches(client.data.split(split, client.device), 4 * client.config.training.batch_size):
            predicted = label_map(predict(client, batch, view), client.activation)
            truth = batch.targets.to(predicted.device)
            known = (truth >= 0) & (truth < num_classes)
            pairs = truth[known] * num_classes + predicted[known]
            counts += torch.bincount(pairs, minlength=num_classes**2).cpu()
    result: np.ndarray[Any, Any] = counts.view(num_classes, num_classes).numpy()
    return result


def write_arrays(path: Path, arrays: Arrays) -> Path:
    """Write an npz atomically. Numbers and text only: object arrays would need unpickling to be read."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    try:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
