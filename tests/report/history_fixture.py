"""A run that never happened, with the shape of a real one: records, site folders, per-case scores, example cases."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def make_config(name: str = "made_up", rounds: int = 12, select: str | None = None) -> Any:
    """The part of a `Config` that reports read."""
    return SimpleNamespace(
        name=name,
        seed=3,
        description="a made-up run",
        engine=SimpleNamespace(name="local"),
        federation=SimpleNamespace(rounds=rounds),
        evaluation=SimpleNamespace(select=select),
    )


def make_history(
    num_sites: int = 5, rounds: int = 12, metric: str = "dice", level: float = 0.85, every: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """Records of a run: training loss falls, the metric rises to about `level`, one answer fails, one value is
    undefined.
    """
    rng = np.random.default_rng(seed)
    sites = [f"site_{i:02d}" for i in range(num_sites)]
    ability = rng.normal(0.0, 0.04, num_sites)

    def record(round: int, phase: str, site: str | None, metrics: dict[str, Any], **other: Any) -> dict[str, Any]:
        base = {"status": "ok", "reason": None, "num_examples": 0, "seconds": 0.25}
        return {"round": round, "phase": phase, "site": site, **base, **other, "metrics": metrics}

    def score(t: int, shift: float) -> float:
        return float(np.clip(level * (1 - math.exp(-t / 3)) + shift + rng.normal(0, 0.01), 0, 1))

    history: list[dict[str, Any]] = []
    for t in range(1, rounds + 1):
        for i, site in enumerate(sites):
            if t == 3 and i == 1:
                history.append(record(t, "train", site, {}, status="failed", reason="non-finite value in 'out.weight'"))
                continue
            loss = 0.9 * math.exp(-t / 4) + 0.1 + abs(ability[i]) + rng.normal(0, 0.01)
            history.append(record(t, "train", site, {"train_loss": loss, "loss/bce": loss}, num_examples=40 + i))
        if t == 4:
            believed = {"believed_noisy": [sites[0], sites[-1]], "quality": dict.fromkeys(sites, 0.2)}
            history.append(record(t, "server", None, believed))
        if t % every and t != rounds:
            continue
        for i, site in enumerate(sites):
            value: float | None = None if (t == 5 and i == 0) else score(t, ability[i])
            metrics = {
                f"val/global/{metric}": score(t, ability[i]),
                f"test/global/{metric}": value,
                "test/global/hd95": 20 / t,
            }
            history.append(record(t, "evaluate", site, metrics, num_examples=10 + i))
        history.append(record(t, "central", None, {f"test/global/{metric}": score(t, 0.01)}, num_examples=50))
    return history


def disc(size: int, row: float, column: float, radius: float) -> np.ndarray:
    """Label map (size, size) of one disc."""
    rows, columns = np.mgrid[:size, :size]
    return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).astype(np.uint8)


def make_overlay(path: Path, num_cases: int = 8, size: int = 64, seed: int = 0, channels: int = 1) -> None:
    """Write example cases: bright discs on noise, predictions that miss by a few pixels."""
    rng = np.random.default_rng(seed)
    images, references, predictions, dice = [], [], [], []
    for i in range(num_cases):
        row, column = (size * rng.uniform(0.35, 0.65, 2)).tolist()
        radius = size * rng.uniform(0.12, 0.24)
        reference = disc(size, row, column, radius)
        reference[disc(size, row, column, radius / 2.5) > 0] = 2
        miss = size / 64 * rng.normal(0.0, 1 + i / 2)
        prediction = disc(size, row + miss, column, radius * (1 + abs(miss) / size))
        prediction[disc(size, row + miss / 2, column, radius / 3) > 0] = 2
        image = np.clip(60 + 80 * (reference > 0) + 50 * (reference > 1) + rng.normal(0, 15, (size, size)), 0, 255)
        images.append(image.astype(np.uint8))
        references.append(reference)
        predictions.append(prediction)
        dice.append(2 * ((reference > 0) & (prediction > 0)).sum() / ((reference > 0).sum() + (prediction > 0).sum()))
    stack = np.stack(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        image=stack if channels == 1 else np.stack([stack, stack // 2, stack // 3], axis=-1),
        reference=np.stack(references),
        prediction=np.stack(predictions),
        dice=np.array(dice),
        item_id=np.array([f"item_{i:03d}" for i in range(num_cases)]),
    )


def make_run(folder: Path, history: list[dict[str, Any]] | None = None, overlays: int = 1) -> list[dict[str, Any]]:
    """Write a run folder with history, per-site cases and overlays, as an engine leaves it; give the history."""
    history = make_history() if history is None else history
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    for site in sorted({r["site"] for r in history if r["site"]}):
        (folder / "sites" / site).mkdir(parents=True)
        with (folder / "sites" / site / "cases.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([["round", "item_id", "dice"], [12, "a", 0.9], [12, "b", ""]])
    for site in sorted({r["site"] for r in history if r["site"]})[:overlays]:
        make_overlay(folder / "sites" / site / "overlay.npz")
    return history
