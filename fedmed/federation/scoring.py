"""Scoring a model on a split: per-case records that stay where they are made, and the aggregates that may leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmed.data.loader import batches
from fedmed.federation import case_files
from fedmed.federation.client import Client
from fedmed.federation.subsets import modality_subsets, restrict, take_away, takes_subsets
from fedmed.files import write_csv, write_json
from fedmed.metrics import evaluate_cases, per_class, summarise

_BY_CLASS = {"classification": "recall", "multilabel": "auc"}


@dataclass
class Scored:
    """Scores of one split in one view: aggregates, one record per case in the order of the split, and by whom they were made."""

    metrics: dict[str, float]
    cases: list[dict[str, Any]]
    client: Client
    split: str
    view: str


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
    cases: list[dict[str, Any]] = []
    probs: list[Tensor] = []
    targets: list[Tensor] = []
    with case_files.evaluating(client):
        for batch in batches(split, 4 * client.config.training.batch_size):
            if subset is not None:
                batch = take_away(batch, subset)
            prob = case_files.predict(client, batch, view)
            truth = case_files.known_targets(client, batch)
            records = evaluate_cases(task, prob, truth, client.activation, len(classes), hd95=hd95)
            rows = batch.index.tolist()
            cases += [
                {"site": client.site, "split": split_name, "view": view, "item": client.data.item_id[i], **r}
                for i, r in zip(rows, records, strict=True)
            ]
            if task != "segmentation":
                probs.append(prob.cpu())
                targets.append(truth.cpu())
    joined = (torch.cat(probs), torch.cat(targets)) if probs else (None, None)
    metrics = summarise(task, joined[0], joined[1], cases, classes) if cases else {}
    name = _BY_CLASS.get(task) if by_class else None
    if name is not None and cases:
        table = per_class(task, joined[0], joined[1], cases, classes)
        metrics |= {f"{name}_{place}": row[name] for place, row in enumerate(table.values())}
    return Scored(metrics, cases, client, split_name, view)


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


def write_case_files(folder: Path, scored: Sequence[Scored]) -> None:
    """Write the records of the last evaluation into a folder of their own (0700), atomically; they never travel.

    `cases.csv` has all cases. Of the first view on the test split (on another split where there is none) come `confusion.json` with the
    counts, and the best, the median and the worst case with their images: `overlay.npz` (segmentation) or `examples.npz`, see
    `fedmed.federation.case_files`. Loads that view into the model again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_csv(folder / "cases.csv", [row for s in scored for row in s.cases])
    judged = next((s for s in scored if s.split == "test"), next(iter(scored), None))
    if judged is None:
        return
    client, what = judged.client, (judged.split, judged.view, judged.cases)
    client.load_view(judged.view)
    write_json(folder / case_files.CONFUSION, case_files.confusion(client, *what))
    arrays = case_files.example_arrays(client, *what)
    if arrays:
        name = case_files.OVERLAY if client.data.task == "segmentation" else case_files.EXAMPLES
        case_files.write_arrays(folder / name, arrays)
