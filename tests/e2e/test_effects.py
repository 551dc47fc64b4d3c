"""Do the mechanisms work? Seeds and margins were written down before the runs: a mechanism is tested, not that a score rises.

Both methods run on the phantom with the settings they ship with, just long enough for their estimate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.config import load_config
from fedmed.data.site_file import read_truth
from fedmed.engines import run
from fedmed.engines.prepare import site_file, with_absolute_paths

SEEDS = (0, 1)


def short_run(experiment: str, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Run until one round after the estimate: summary and truth by site."""
    words = [
        "federation.rounds=5",
        "strategy.args.warmup_rounds=4",
        "evaluation.sites=false",
        f"seed={seed}",
        f"out={folder / 'run'}",
    ]
    config = load_config(experiment, words)
    return run(config), read_truth(site_file(with_absolute_paths(config)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_fednoro_finds_the_noisy_sites_and_trusts_them_less(seed: int, tmp_path: Path) -> None:
    summary, truth = short_run("fednoro", seed, tmp_path)
    assert sum(t["is_noisy"] for t in truth.values()) == 5
    assert summary["noisy_sites"]["precision"] >= 0.8
    assert summary["noisy_sites"]["recall"] >= 0.8
    weights, sites = summary["notes"]["weights"], summary["notes"]["believed_noisy"]
    counts = {site: info["n"] for site, info in examples(tmp_path / "run").items()}
    total = sum(counts.values())
    gain = {site: weights[site] / (counts[site] / total) for site in weights}
    assert max(gain[s] for s in sites) < min(gain[s] for s in gain if s not in sites)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_feda3i_tells_direction_and_strength_of_the_contour_noise(seed: int, tmp_path: Path) -> None:
    summary, truth = short_run("feda3i", seed, tmp_path)
    notes = summary["notes"]
    # Nearly all clients on their side: at most one of twelve in the other group.
    assert abs(notes["groups"]["shrinkage"] - sum(t["mu"] < 0 for t in truth.values())) <= 1
    expanding = [site for site, t in truth.items() if t["mu"] > 0]
    strength = np.array([truth[s]["mu"] for s in expanding])
    quality = np.array([notes["quality"][s] for s in expanding])
    ranks = [np.argsort(np.argsort(values)) for values in (strength, quality)]
    assert np.corrcoef(*ranks)[0, 1] <= -0.5  # the larger the masks, the smaller the weight


def examples(folder: Path) -> dict[str, dict[str, Any]]:
    """Number of training items by site, from the history."""
    import json

    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {r["site"]: {"n": r["num_examples"]} for r in records if r["phase"] == "train"}
