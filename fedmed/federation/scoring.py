"""Scoring a model on a split: per-case records that stay where they are made, and the aggregates that may leave."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.data.loader import batches
from fedmed.data.split import Batch
from fedmed.federation.client import Client
from fedmed.federation.subsets import modality_subsets, restrict, take_away, takes_subsets
from fedmed.files import write_csv
from fedmed.metrics import evaluate_cases, per_class, summarise

_OVERLAY_ITEMS = 4
_BY_CLASS = {"classification": "recall", "multilabel": "auc"}


@dataclass
class Scored:
    """Scores of one split in one view: aggregates, one record per case, and a few pictures for the overlay sheet (segmentation)."""

    metrics: dict[str, float]
    cases: list[dict[str, Any]]
    overlay: dict[str, np.ndarray[Any, Any]]


def score(
    client: Client,
    split_name: str,
    view: str,
    *,
    hd95: bool = False,
    subset: Sequence[int] | None = None,
    by_class: bool = False,
) -> Scored:
    """Score the view that is loaded into the client's model on one split, ordered and unaugmented.

    Segmentation is scored batch by batch; for the other tasks probabilities are collected, (n, C) numbers. `subset`: places
    of the modalities the model is shown, on the items that have any of them; None: all an item has. `by_class`: adds
    `recall_<c>` (classification) or `auc_<c>` (multi-label) of every class c.
    """
    split = client.data.split(split_name, client.device)
    if subset is not None:
        split = restrict(split, subset)
    task, classes = client.data.task, client.data.classes
    was_training = client.model.training
    client.model.eval()
    cases: list[dict[str, Any]] = []
    probs: list[Tensor] = []
    targets: list[Tensor] = []
    overlay: dict[str, np.ndarray[Any, Any]] = {}
    with torch.no_grad():
        for batch in batches(split, 4 * client.config.training.batch_size):
            if subset is not None:
                batch = take_away(batch, subset)
            with client.autocast():
                prob = client.predict(batch, view).float()
            truth = _known(client, batch)
            records = evaluate_cases(task, prob, truth, client.activation, len(classes), hd95=hd95)
            rows = batch.index.tolist()
            cases += [
                {"site": client.site, "split": split_name, "view": view, "item": client.data.item_id[i], **r}
                for i, r in zip(rows, records, strict=True)
            ]
            if task != "segmentation":
                probs.append(prob.cpu())
                targets.append(truth.cpu())
            elif not overlay:
                overlay = _pictures(client, batch.images, batch.targets, prob)
    client.model.train(was_training)
    joined = (torch.cat(probs), torch.cat(targets)) if probs else (None, None)
    metrics = summarise(task, joined[0], joined[1], cases, classes) if cases else {}
    name = _BY_CLASS.get(task) if by_class else None
    if name is not None and cases:
        table = per_class(task, joined[0], joined[1], cases, classes)
        metrics |= {f"{name}_{place}": row[name] for place, row in enumerate(table.values())}
    return Scored(metrics, cases, overlay)


def _known(client: Client, batch: Batch) -> Tensor:
    """The targets of a batch; of multi-label items NaN, unknown, where a class is not annotated for an item."""
    active = client.data.annotated(batch) if client.data.task == "multilabel" else None
    return batch.targets if active is None else batch.targets.masked_fill(~active, float("nan"))


def score_view(
    client: Client, view: str, *, hd95: bool = False, condition: str = "", by_class: bool = False
) -> tuple[dict[str, Any], list[Scored]]:
    """Load a view and score it on the test split, and on the validation split where a round is chosen by it.

    Out: `n/<split>` and `<split>/<view>/<metric>` as they are reported, and the details of each split that has items.
    Data under a `condition` (a degraded copy, ...) are scored on their test items alone, named `test-<condition>`:
    nothing is chosen or judged by them.
    """
    client.load_view(view)
    metrics: dict[str, Any] = {}
    details: list[Scored] = []
    for split in ("val", "test") if client.config.evaluation.select and not condition else ("test",):
        name = f"{split}-{condition}" if condition else split
        count = client.data.num_examples(split)
        metrics[f"n/{name}"] = count
        if count:
            scored = score(client, split, view, hd95=hd95, by_class=by_class)
            details.append(scored)
            metrics.update({f"{name}/{view}/{metric}": value for metric, value in scored.metrics.items()})
    return metrics, details


def score_subsets(client: Client) -> dict[str, Any]:
    """Score the global view on the test split with every subset of the modalities: `n/<split>`, `<split>/global/<metric>`.

    Every item is shown what it has of the subset. One that has nothing of it is left out, so n may be smaller than that of
    the test split; a subset of which no item has anything has n 0 and no scores. {} for a model that cannot be told what is
    missing, for one modality, and for a client without a global view. No records of single cases are made.
    """
    if "global" not in client.views or not takes_subsets(client.model, len(client.data.channels)):
        return {}
    client.load_view("global")
    metrics: dict[str, Any] = {}
    for name, subset in modality_subsets(client.data.channels).items():
        scored = score(client, "test", "global", subset=subset)
        metrics[f"n/{name}"] = len(scored.cases)
        metrics.update({f"{name}/global/{metric}": value for metric, value in scored.metrics.items()})
    return metrics


def _pictures(client: Client, images: Tensor, targets: Tensor, prob: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    from fedmed.models.heads import label_map

    chosen = slice(0, _OVERLAY_ITEMS)
    low, high = images[chosen].amin(dim=(1, 2, 3), keepdim=True), images[chosen].amax(dim=(1, 2, 3), keepdim=True)
    shown = ((images[chosen] - low) / (high - low).clamp_min(1e-6) * 255).byte()
    return {
        "image": shown.permute(0, 2, 3, 1).cpu().numpy(),
        "reference": targets[chosen].to(torch.uint8).cpu().numpy(),
        "prediction": label_map(prob[chosen], client.activation).to(torch.uint8).cpu().numpy(),
    }


def write_case_files(folder: Path, scored: list[Scored]) -> None:
    """Write `cases.csv` and, for segmentation, `overlay.npz` into a site's own folder (0700), atomically; they never travel."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_csv(folder / "cases.csv", [row for s in scored for row in s.cases])
    overlay = next((s.overlay for s in scored if s.overlay), None)
    if overlay:
        temporary = folder / f".overlay.{os.getpid()}.tmp.npz"
        np.savez_compressed(temporary, **overlay)  # type: ignore[arg-type]
        temporary.replace(folder / "overlay.npz")
