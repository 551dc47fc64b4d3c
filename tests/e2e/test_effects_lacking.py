"""Do the methods for what a site lacks do what they are for? Seeds, margins and signs below were written down before the first run.

- FedMLP, seeds 0 and 1: pseudo-labels of the last round, pooled over the sites, against the reference: precision of the positive ones at least
  1.5 times the share of positives among the labels the sites lack; precision of the negative ones above the share of negatives.
- FedNPR, seeds 0, 1, 2, 8 rounds of 10 epochs, against FedAvg with the same base loss (λ = 1e-6 only measures the term): the regulariser itself,
  last round, without its factor, smaller with λ = .05; recall of the three rarest classes, central test, last 5 rounds, not lower by
  more than .02; both for the mean of the seeds.
- FCA, seeds 0, 1, 2, against FedAvg with the same base loss: Kullback-Leibler divergence of the federated from the personal head
  (`loss/con`, last round) smaller with λ_con = 1 than with a λ_con that only measures it (1e-6); recall of the three rarest classes on the
  sites' own test items, personal heads against FedAvg's model, not lower by more than .02; both for the mean of the seeds.
- PASSION, seeds 0 and 1, against plain training of the same network: spread of the central Dice over all subsets of the modalities smaller by at
  least .02, mean of the seeds.

Three claims written before did not hold.

- FedNPR with the two epochs a round of its experiment, four to six steps at a site: test features closer to their class mean than to others by
  more than with FedAvg (difference of cosines .0335 with the term, .0336 without), and the regulariser smaller than where it is only
  measured (1.0002 and 1.0000): prototypes are made anew each round, and so few steps do not use them.
- FCA: recall of the rarest classes, central test, federated head, not lower by more than .02 (.432 against FedAvg's .476: with λ_per = 3 the
  personal heads lead the shared features).

Everything is as the experiments ship it, but for image size 32 where they leave it open. Arms share base loss, initial weights and data order.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clients.missing_classes import TAGS
from clients.prototype_tags import NEGATIVE, POSITIVE
from fedmed.config import load_config
from fedmed.data.site_file import SiteFile
from fedmed.engines import run
from fedmed.engines.prepare import site_file, with_absolute_paths
from fedmed.federation.checkpoint import read_safetensors
from fedmed.files import read_history

Records = list[dict[str, Any]]
SMALL = ["data.phantom={images_per_site: 300, image_size: 32}"]
LOSS = ["client.args.loss=logit_adjusted_ce", "client.args.prior_eps=1.0e-9"]


def do(experiment: str, out: Path, *words: str) -> tuple[dict[str, Any], Records, Path]:
    """Summary, history and site file of a run."""
    config = load_config(experiment, ["evaluation.sites=false", *words, f"out={out}"])
    return run(config), read_history(out), site_file(with_absolute_paths(config))


# ---------------------------------------------------------------------- FedMLP


def pseudo_labels(out: Path, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tags and true labels of all (training item, missing class) pairs of all sites."""
    tags, truth = [], []
    with SiteFile.open(path) as file, h5py.File(path, "r") as raw:
        for info in file.sites:
            group, rows = raw[info.group], file.site(info.name).split("train").index.numpy()
            missing = group["active_classes"][()][rows] == 0
            newest = max((out / "sites" / info.name / "personal").glob("round-*"))
            kept = read_safetensors(newest / "personal.safetensors")[TAGS].numpy()
            tags.append(kept[missing])
            truth.append(group["reference"]["label"][()][rows][missing])
    return np.concatenate(tags), np.concatenate(truth)


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 1))
def test_fedmlp_recovers_missing_labels(seed: int, tmp_path: Path) -> None:
    _, _, path = do("fedmlp", tmp_path / "run", f"seed={seed}")
    tags, truth = pseudo_labels(tmp_path / "run", path)
    positives = truth.mean()
    found = {"positive": truth[tags == POSITIVE], "negative": 1 - truth[tags == NEGATIVE]}
    assert all(len(values) > 0 for values in found.values())
    assert found["positive"].mean() >= 1.5 * positives, f"precision {found['positive'].mean()}, chance {positives}"
    assert found["negative"].mean() > 1 - positives, f"precision {found['negative'].mean()}, chance {1 - positives}"


# ---------------------------------------------------------------------- FedNPR, FCA


def rarest(path: Path) -> list[int]:
    """The three classes with the fewest training items."""
    with SiteFile.open(path) as file:
        counts = sum(file.site(info.name).split("train").class_counts() for info in file.sites)
    return [int(c) for c in np.argsort(counts, kind="stable")[:3]]


def tail_recall(history: Records, path: Path, last: int = 5) -> float:
    """Mean recall of these classes over the last rounds, central test set."""
    central = [r["metrics"] for r in history if r["phase"] == "central"][-last:]
    return statistics.fmean(m[f"test/global/recall_{c}"] for m in central for c in rarest(path))


def own_tail_recall(out: Path, path: Path, view: str) -> float:
    """Mean recall of the same classes over all sites' own test items, in the last evaluation, for a view."""
    rows = []
    for table in sorted((out / "sites").glob("*/cases.csv")):
        with table.open() as file:
            rows += [row for row in csv.DictReader(file) if row["view"] == view and row["split"] == "test"]
    recalls = []
    for c in rarest(path):
        right = [float(row["correct"]) for row in rows if float(row["label"]) == c]
        recalls += [statistics.fmean(right)] if right else []
    return statistics.fmean(recalls)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_npr_is_reduced_and_does_not_cost_the_tail(tmp_path: Path) -> None:
    term: dict[float, list[float]] = {0.05: [], 1e-6: []}
    recall: dict[float, list[float]] = {0.05: [], 1e-6: []}
    longer = ["training.epochs=10", "federation.rounds=8", "optimizer.milestones=[]"]
    for seed in (0, 1, 2):
        for lam, found in term.items():
            words = [*longer, f"client.npr.lam={lam}", f"seed={seed}"]
            _, history, path = do("fednpr", tmp_path / f"{lam}-{seed}", *words)
            found.append(last_term(history, "loss/npr") / lam)  # terms are logged with their weight
            recall[lam].append(tail_recall(history, path))
    assert statistics.fmean(term[0.05]) < statistics.fmean(term[1e-6]), term
    assert statistics.fmean(recall[0.05]) >= statistics.fmean(recall[1e-6]) - 0.02, recall


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fca_anchors_the_federated_head_and_serves_the_tail_at_the_sites(tmp_path: Path) -> None:
    plain = ["model.name=small_cnn", "model.args=null", "client.name=supervised", "client.args=null", *LOSS]
    recall: dict[str, list[float]] = {"personal": [], "plain": []}
    divergence: dict[str, list[float]] = {"anchored": [], "measured": []}
    for seed in (0, 1, 2):
        words = [*SMALL, f"seed={seed}", "evaluation.sites=true"]
        _, history, path = do("fca", tmp_path / f"fca-{seed}", *words)
        divergence["anchored"].append(last_term(history, "loss/con"))
        recall["personal"].append(own_tail_recall(tmp_path / f"fca-{seed}", path, "personal"))
        do("fca", tmp_path / f"plain-{seed}", *words, *plain)
        recall["plain"].append(own_tail_recall(tmp_path / f"plain-{seed}", path, "global"))
        _, history, _ = do("fca", tmp_path / f"free-{seed}", *SMALL, "client.args.lambda_con=1.0e-6", f"seed={seed}")
        divergence["measured"].append(last_term(history, "loss/con") * 1e6)
    assert statistics.fmean(divergence["anchored"]) < statistics.fmean(divergence["measured"]), divergence
    assert statistics.fmean(recall["personal"]) >= statistics.fmean(recall["plain"]) - 0.02, recall


def last_term(history: Records, name: str) -> float:
    """Mean over the sites of a loss term in the last round."""
    train = [r for r in history if r["phase"] == "train"]
    last = max(r["round"] for r in train)
    return statistics.fmean(r["metrics"][name] for r in train if r["round"] == last)


# ---------------------------------------------------------------------- PASSION


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_passion_serves_the_subsets_more_evenly(tmp_path: Path) -> None:
    plain = ["strategy.name=fedavg", "strategy.args=null", "client.args.mode=plain"]
    narrowed = []
    for seed in (0, 1):
        spread = {}
        for name, words in (("passion", []), ("plain", plain)):
            summary, _, _ = do("passion", tmp_path / f"{name}-{seed}", *words, f"seed={seed}")
            assert len(summary["subsets"]["by_subset"]) == 7
            spread[name] = summary["subsets"]["spread"]
        narrowed.append(spread["plain"] - spread["passion"])
    assert statistics.fmean(narrowed) >= 0.02, f"spread of plain training minus that of PASSION, by seed: {narrowed}"
