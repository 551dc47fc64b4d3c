"""Do FedISM and FedIA do what they are for? Seeds, margins and signs below were written down before the first run.

| method | seeds | claim |
|--|--|--|
| FedISM | 0, 1, 2 | in every round the weights are those of the formula, from the two losses each site sent, to 1e-9 |
| FedISM | 0, 1, 2 | AUC on clean minus AUC on degraded test items, mean of the last 5 of 16 rounds: over the seeds smaller than FedAvg's by at least .01 |
| FedIA | 0, 1 | Spearman correlation of the completeness found and the true one over the 8 sites: at least .8 |
| FedIA | 0, 1 | masks of the incomplete sites that were corrected: mean Dice with the reference higher than that of the masks given |

Everything is as the experiments ship it, but for smaller images (FedISM, 32 pixels a side). Arms share base loss, initial weights and data order.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.stats import spearmanr

from clients.annotation_completion import ADDED, complete, unpack
from data_prep.geometry import mask_dice
from fedmed.config import load_config
from fedmed.data.site_file import SiteFile, read_truth
from fedmed.engines import run
from fedmed.engines.prepare import site_file, with_absolute_paths
from fedmed.federation.checkpoint import read_safetensors
from fedmed.files import read_history

FEDISM_SEEDS, FEDIA_SEEDS = (0, 1, 2), (0, 1)
PLAIN = ["strategy.name=fedavg", "strategy.args=null", "client.name=supervised", "client.args=null"]
SMALL = ["data.phantom={images_per_site: 300, image_size: 32}", "evaluation.sites=false"]


def do(experiment: str, out: Path, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and history of a run."""
    summary = run(load_config(experiment, [*words, f"out={out}"]))
    return summary, read_history(out)


def last_auc_gap(history: list[dict[str, Any]], last: int = 5) -> float:
    """AUC on clean minus AUC on degraded test items, mean over the last rounds."""
    central = [r["metrics"] for r in history if r["phase"] == "central"][-last:]
    return statistics.fmean(m["test/global/auc"] - m["test-corrupted/global/auc"] for m in central)


def weights_by_formula(history: list[dict[str, Any]], q: float, beta: float) -> list[dict[str, float]]:
    """ω of every round, written anew from the paper: S, a, average."""
    omega: dict[str, float] = {}
    found = []
    for number in sorted({r["round"] for r in history if r["phase"] == "train"}):
        replies = [r for r in history if r["phase"] == "train" and r["round"] == number]
        s = {r["site"]: max(r["metrics"]["loss_perturbed"] - r["metrics"]["loss_base"], 1e-10) for r in replies}
        a = {site: (value / sum(s.values()) + 1e-10) ** q for site, value in s.items()}
        a = {site: value / sum(a.values()) for site, value in a.items()}
        omega = {site: beta * a[site] + (1 - beta) * omega[site] for site in a} if omega else a
        found.append(omega)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fedism_follows_the_sharpness_and_narrows_the_gap(tmp_path: Path) -> None:
    narrowed = []
    for seed in FEDISM_SEEDS:
        words = [*SMALL, f"seed={seed}"]
        summary, history = do("fedism", tmp_path / f"fedism-{seed}", *words)
        loss = "client.args.loss=logit_adjusted_ce"
        _, plain = do("fedism", tmp_path / f"fedavg-{seed}", *words, *PLAIN, loss)
        noted = [r["metrics"]["weights"] for r in history if "weights" in r["metrics"]]
        expected = weights_by_formula(history, q=2.0, beta=0.5)
        assert len(noted) == len(expected) == 16
        for ours, theirs in zip(noted, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)
        assert sum(bool(t["is_noisy"]) for t in summary["truth"].values()) == 4
        narrowed.append(last_auc_gap(plain) - last_auc_gap(history))
    assert statistics.fmean(narrowed) >= 0.01, f"AUC gap of FedAvg minus that of FedISM, by seed: {narrowed}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", FEDIA_SEEDS)
def test_fedia_ranks_the_sites_and_completes_their_masks(seed: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [f"seed={seed}", "evaluation.sites=false"]
    summary, _ = do("fedia", out, *words)
    path = site_file(with_absolute_paths(load_config("fedia", [*words, f"out={out}"])))
    truth, notes = read_truth(path), summary["notes"]
    assert set(notes["completeness"]) == set(truth) and len(truth) == 8
    sites = sorted(truth)
    rank = spearmanr([notes["completeness"][s] for s in sites], [truth[s]["completeness"] for s in sites]).statistic
    assert rank >= 0.8
    given, corrected = [], []
    for site in (s for s in sites if truth[s]["completeness"] < 1 and s in notes["corrected"]):
        before, after = mask_scores(path, site, out)
        given.append(before)
        corrected.append(after)
    assert given, "no incomplete site was corrected"
    assert statistics.fmean(corrected) > statistics.fmean(given), f"by site: {given} before, {corrected} after"


def mask_scores(path: Path, site: str, out: Path) -> tuple[float, float]:
    """Mean Dice with the reference of the training masks of a site: as given, and as it has completed them."""
    with SiteFile.open(path) as file:
        group = next(info.group for info in file.sites if info.name == site)
        given = file.site(site).split("train").targets
    with h5py.File(path, "r") as raw:
        reference = raw[group]["reference"]["mask"][()][np.asarray(raw[group].attrs["train_idx"])]
    newest = max((out / "sites" / site / "personal").glob("round-*"))
    added = unpack(read_safetensors(newest / "personal.safetensors")[ADDED], tuple(given.shape))
    import torch

    completed = complete(given, torch.from_numpy(added))
    scores = [
        [mask_dice(truth, mask) for truth, mask in zip(reference, masks.numpy(), strict=True)]
        for masks in (given, completed)
    ]
    assert all(math.isfinite(s) for s in scores[0])
    return statistics.fmean(scores[0]), statistics.fmean(scores[1])
