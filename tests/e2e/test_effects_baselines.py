"""Do the baselines do what they are for? Seeds, settings and signs below were written down before the first run.

- q-FedAvg, seeds 0 and 1: losses of the received model over the sites, last 3 rounds: standard deviation / mean smaller with
  q = 2 than with q = 0, mean of the seeds.
- Agnostic, seeds 0 and 1: without γ the new model is the reply of the site with the largest loss; with γ the final λ ranks the sites
  by their mean loss, Spearman > .5.
- FairFed, seeds 0 and 1: weights by the formula in every round; Spearman of mean gap and (final weight − size share) < 0.
- FedGA, seeds 0 and 1: weights by the formula in every round; Spearman of the sum of the normalised gaps and the final weight > 0.
- SCAFFOLD, seeds 0 and 1: squared distance of the site models from their mean over that of the mean from the received model, last 3 of
  10 rounds: smaller than without control variates.
- FedNova, seed 0: sites of 20 to 200 images: the largest weight of one step is within 15 % of 1/K, where FedAvg's is its size share.
- Ditto, seeds 0 and 1, site shift and case mix 2: accuracy of the personal models above the global one's, mean of sites and seeds,
  λ = .01; distance of personal from global model smaller with λ = 10 than with λ = .01.

Phantom of 32 pixels a side. Arms that are compared share loss, initial weights and data order.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from scipy.stats import spearmanr

from fedmed.config import load_config
from fedmed.engines import run
from fedmed.federation import messages
from fedmed.federation.checkpoint import read_safetensors
from fedmed.files import read_history

SEEDS = (0, 1)
UNEQUAL = [  # eight sites, the last three with poor images
    "data.partition.name=fedism",
    "data.partition.args={num_clients: 8, num_corrupted: 3, alpha: 1.0}",
    "data.corruption.name=image_quality",
    "data.corruption.args={kind: gaussian_noise, severity: 4, num_corrupted: 3}",
    "data.phantom={num_sites: 4, images_per_site: 150, image_size: 32}",
    "federation.rounds=8",
    "evaluation.sites=false",
]
Records = list[dict[str, Any]]


def do(experiment: str, out: Path, *words: str, **options: Any) -> tuple[dict[str, Any], Records]:
    """Summary and history of a run."""
    summary = run(load_config(experiment, [*words, f"out={out}"]), **options)
    return summary, read_history(out)


def by_round(history: Records, key: str) -> list[dict[str, float]]:
    """site → metric of the train replies, round by round."""
    rounds = sorted({r["round"] for r in history if r["phase"] == "train"})
    return [
        {r["site"]: r["metrics"][key] for r in history if r["phase"] == "train" and r["round"] == number}
        for number in rounds
    ]


def noted_weights(history: Records) -> list[dict[str, float]]:
    return [r["metrics"]["weights"] for r in history if r["phase"] == "server" and "weights" in r["metrics"]]


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {site: statistics.fmean(row[site] for row in rows) for site in rows[0]}


def rank(first: dict[str, float], second: dict[str, float]) -> float:
    return float(spearmanr([first[s] for s in first], [second[s] for s in first]).statistic)


@pytest.mark.slow
def test_qfedavg_evens_out_the_losses(tmp_path: Path) -> None:
    spread: dict[float, list[float]] = {0.0: [], 2.0: []}
    for seed in SEEDS:
        for q, found in spread.items():
            words = [*UNEQUAL, f"strategy.args.q={q}", f"seed={seed}"]
            _, history = do("qfedavg", tmp_path / f"{q}-{seed}", *words)
            losses = [list(row.values()) for row in by_round(history, "loss_received")[-3:]]
            found.append(statistics.fmean(statistics.pstdev(row) / statistics.fmean(row) for row in losses))
    assert statistics.fmean(spread[2.0]) < statistics.fmean(spread[0.0]), spread


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_agnostic_serves_the_worst_site(seed: int, tmp_path: Path) -> None:
    replies: dict[int, dict[str, torch.Tensor]] = {}

    def listen(message: Message, call: Callable[[], Message]) -> Message:
        reply = call()
        if message.metadata.message_type.startswith("train") and message.metadata.group_id == "3":
            state = messages.arrays_of(reply.content, messages.ARRAYS)
            replies[message.metadata.dst_node_id] = {name: value.clone() for name, value in state.items()}
        return reply

    words = [*UNEQUAL, f"seed={seed}"]
    out = tmp_path / "worst"
    _, history = do("agnostic", out, *words, "federation.rounds=3", "strategy.args.step=null", intercept=listen)
    losses = by_round(history, "loss_received")[-1]
    worst = max(losses, key=lambda site: losses[site])
    assert noted_weights(history)[-1] == {site: float(site == worst) for site in losses}
    final = read_safetensors(out / "model.safetensors")
    equal = [node for node, state in replies.items() if all(torch.equal(final[n], v) for n, v in state.items())]
    assert len(equal) == 1

    _, history = do("agnostic", tmp_path / "ascent", *words, "strategy.args.step=0.05")
    assert rank(mean_of(by_round(history, "loss_received")), noted_weights(history)[-1]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_fairfed_takes_weight_from_sites_off_the_mean(seed: int, tmp_path: Path) -> None:
    _, history = do("fairfed", tmp_path / "run", *UNEQUAL, f"seed={seed}", "strategy.args.beta=1.0")
    accuracy = by_round(history, "bacc_received")
    n = {r["site"]: r["num_examples"] for r in history if r["phase"] == "train"}
    share = {site: count / sum(n.values()) for site, count in n.items()}
    omega, gaps = dict(share), []
    for number, row in enumerate(accuracy):
        overall = sum(share[site] * value for site, value in row.items())
        gap = {site: abs(value - overall) for site, value in row.items()}
        if number:
            raw = {s: max(omega[s] - (gap[s] - statistics.fmean(gap.values())), 0.0) for s in row}
            omega = {s: value / sum(raw.values()) for s, value in raw.items()}
        gaps.append(gap)
        assert noted_weights(history)[number] == pytest.approx(omega, abs=1e-9)
    assert rank(mean_of(gaps[1:]), {s: omega[s] - share[s] for s in omega}) < 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_fedga_gives_weight_to_sites_that_lose_by_averaging(seed: int, tmp_path: Path) -> None:
    _, history = do("fedga", tmp_path / "run", *UNEQUAL, f"seed={seed}")
    received, trained = by_round(history, "loss_received"), by_round(history, "train_loss")
    sites = list(received[0])
    omega, total = {s: 1 / len(sites) for s in sites}, dict.fromkeys(sites, 0.0)
    for number, row in enumerate(received):
        if number:
            gap = {s: row[s] - trained[number - 1][s] for s in sites}
            h = {s: value - statistics.fmean(gap.values()) for s, value in gap.items()}
            largest = max(abs(value) for value in h.values())
            step = 0.05 * (len(received) - number) / len(received) / len(sites)
            raw = {s: max(omega[s] + step * h[s] / largest, 0.0) for s in sites}
            omega = {s: value / sum(raw.values()) for s, value in raw.items()}
            total = {s: total[s] + h[s] / largest for s in sites}
        assert noted_weights(history)[number] == pytest.approx(omega, abs=1e-9)
    assert rank(total, omega) > 0


class Drift:
    """Listens to train messages: how far the site models of a round lie from their mean, relative to the step of the mean."""

    def __init__(self) -> None:
        self.rounds: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def __call__(self, message: Message, call: Callable[[], Message]) -> Message:
        reply = call()
        if message.metadata.message_type.startswith("train"):
            start, end = (self._flat(m) for m in (message, reply))
            self.rounds.setdefault(int(message.metadata.group_id), (start, []))[1].append(end)
        return reply

    @staticmethod
    def _flat(message: Message) -> torch.Tensor:
        state = messages.arrays_of(message.content, messages.ARRAYS)
        kept = [v.double().flatten() for n, v in state.items() if v.is_floating_point() and "running" not in n]
        return torch.cat(kept)

    def relative(self, last: int = 3) -> float:
        values = []
        for number in sorted(self.rounds)[-last:]:
            start, ends = self.rounds[number]
            mean = torch.stack(ends).mean(dim=0)
            apart = statistics.fmean(float((end - mean).square().sum()) for end in ends)
            values.append(apart / float((mean - start).square().sum()))
        return statistics.fmean(values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_scaffold_keeps_the_sites_together(seed: int, tmp_path: Path) -> None:
    skewed = [
        "data.partition.name=dirichlet",
        "data.partition.args={num_clients: 6, alpha: 0.1}",
        "data.phantom={num_sites: 4, images_per_site: 150, image_size: 32}",
        "optimizer={name: sgd, lr: 0.02, momentum: 0.0}",
        "training.epochs=4",
        "federation.rounds=10",
        "evaluation.sites=false",
        f"seed={seed}",
    ]
    found = {}
    for arm, words in (
        ("scaffold", []),
        ("plain", ["strategy.name=fedavg", "strategy.args=null", "client.name=supervised"]),
    ):
        drift = Drift()
        do("scaffold", tmp_path / arm, *skewed, *words, intercept=drift)
        found[arm] = drift.relative()
    assert found["scaffold"] < found["plain"], found


@pytest.mark.slow
def test_fednova_counts_a_step_of_a_small_site_like_one_of_a_large_site(tmp_path: Path) -> None:
    sizes = [20, 40, 60, 100, 200]
    words = [
        f"data.phantom={{num_sites: 5, images_per_site: {sizes}, image_size: 32}}",
        "training.batch_size=7",
        "federation.rounds=3",
    ]
    _, history = do("fednova", tmp_path / "run", *words, "evaluation.sites=false", "seed=0", "optimizer.momentum=0.0")
    weights = noted_weights(history)[-1]
    assert max(weights.values()) == pytest.approx(1 / 5, rel=0.15)
    n = {r["site"]: r["num_examples"] for r in history if r["phase"] == "train"}
    assert max(n.values()) / sum(n.values()) > 0.4


@pytest.mark.slow
def test_ditto_fits_the_sites_and_is_held_by_lambda(tmp_path: Path) -> None:
    gains, apart = [], {0.01: [], 10.0: []}
    for seed in SEEDS:
        for lam, found in apart.items():
            words = [
                "data.phantom={num_sites: 5, images_per_site: 150, image_size: 32, site_shift: 2.0, case_mix: 2.0}",
                "federation.rounds=8",
                f"client.args.lam={lam}",
                f"seed={seed}",
            ]
            out = tmp_path / f"{lam}-{seed}"
            _, history = do("ditto", out, *words)
            last = [r["metrics"] for r in history if r["phase"] == "evaluate" and r["round"] == 8]
            if lam == 0.01:
                gains.append(statistics.fmean(m["test/personal/acc"] - m["test/global/acc"] for m in last))
            found.append(distance(out))
    assert statistics.fmean(gains) > 0, gains
    assert all(far > near for far, near in zip(apart[0.01], apart[10.0], strict=True)), apart


def distance(out: Path) -> float:
    """Mean distance of the sites' models from the global one, over the floating entries."""
    final = read_safetensors(out / "model.safetensors")
    values = []
    for folder in (out / "sites").iterdir():
        own = read_safetensors(max((folder / "personal").glob("round-*")) / "personal.safetensors")
        squares = [float((own[n] - v).double().square().sum()) for n, v in final.items() if v.is_floating_point()]
        values.append(float(np.sqrt(sum(squares))))
    return statistics.fmean(values)
