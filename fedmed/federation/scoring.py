"""Scoring a model on a split: per-case records that stay where they are made, and the aggregates that may leave."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.data.loader import batches
from fedmed.federation.client import Client
from fedmed.files import write_csv
from fedmed.metrics import evaluate_cases, summarise

_OVERLAY_ITEMS = 4


@dataclass
class Scored:
    """Scores of one split in one view: aggregates, one record per case, and a few pictures for the overlay sheet (segmentation)."""

    metrics: dict[str, float]
    cases: list[dict[str, Any]]
    overlay: dict[str, np.ndarray[Any, Any]]


def score(client: Client, split_name: str, view: str, *, hd95: bool = False) -> Scored:
    """Score the view that is loaded into the client's model on one split, ordered and unaugmented.

    Segmentation is scored batch by batch; for the other tasks probabilities are collected, (n, C) numbers.
    """
    split = client.data.split(split_name, client.device)
    task, classes = client.data.task, client.data.classes
    was_training = client.model.training
    client.model.eval()
    cases: list[dict[str, Any]] = []
    probs: list[Tensor] = []
    targets: list[Tensor] = []
    overlay: dict[str, np.ndarray[Any, Any]] = {}
    with torch.no_grad():
        for batch in batches(split, 4 * client.config.training.batch_size):
            with client.autocast():
                prob = client.predict(batch, view).float()
            records = evaluate_cases(task, prob, batch.targets, client.activation, len(classes), hd95=hd95)
            rows = batch.index.tolist()
            cases += [
                {"site": client.site, "split": split_name, "view": view, "item": client.data.item_id[i], **r}
                for i, r in zip(rows, records, strict=True)
            ]
            if task != "segmentation":
                probs.append(prob.cpu())
                targets.append(batch.targets.cpu())
            elif not overlay:
                overlay = _pictures(client, batch.images, batch.targets, prob)
    client.model.train(was_training)
    joined = (torch.cat(probs), torch.cat(targets)) if probs else (None, None)
    return Scored(summarise(task, joined[0], joined[1], cases, classes) if cases else {}, cases, overlay)


def score_view(
    client: Client, view: str, *, hd95: bool = False, condition: str = ""
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
            scored = score(client, split, view, hd95=hd95)
            details.append(scored)
            metrics.update({f"{name}/{view}/{metric}": value for metric, value in scored.metrics.items()})
    return metrics, details


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
