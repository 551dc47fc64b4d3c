"""The final model depends on the seed and on nothing else: not on arrival order, node ids, or what ran before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "augmented": {"data.augment": ["hflip", "shift"], "training.epochs": 2},
    "sampled": {"federation.fraction": 0.5, "data.phantom": {"num_sites": 4, "images_per_site": 20, "image_size": 16}},
    "large": {
        "model.args": {"widths": [32, 128, 256]},
        "federation.rounds": 4,
    },  # states above a megabyte share memory blocks
    "fedbn": {"client.name": "local_norm", "optimizer.persist": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_arrival_order_and_node_ids_do_not_matter(lab: Any, method: str) -> None:
    settings = METHODS[method]
    plain, _ = lab.run(**settings)
    scrambled, _ = lab.run(**settings, options={"arrival_seed": 7})
    assert lab.model(plain) == lab.model(scrambled)
    assert lab.history(plain) == lab.history(scrambled)


def test_same_seed_same_bits_other_seed_other_model(lab: Any) -> None:
    (first, _), (second, _), (other, _) = lab.run(seed=3), lab.run(seed=3), lab.run(seed=4)
    assert lab.model(first) == lab.model(second) != lab.model(other)
    assert lab.history(first) == lab.history(second)


def test_sampling_is_drawn_from_seed_and_round(lab: Any) -> None:
    sites = {"num_sites": 4, "images_per_site": 20, "image_size": 16}
    settings = {"federation.fraction": 0.5, "federation.rounds": 4, "data.phantom": sites, "evaluation.sites": False}
    drawn = []
    for seed in (0, 1):
        out, _ = lab.run(seed=seed, **settings)
        rounds = [[r["site"] for r in lab.history(out, phase="train", round=n)] for n in range(1, 5)]
        assert all(len(names) == 2 and names == sorted(names) for names in rounds)
        assert len({tuple(names) for names in rounds}) > 1
        drawn.append(rounds)
    assert drawn[0] != drawn[1]


def test_at_least_min_sites_are_sampled(lab: Any) -> None:
    out, _ = lab.run(**{"federation.fraction": 0.1, "federation.min_sites": 2, "federation.rounds": 1})
    assert len(lab.history(out, phase="train")) == 2


def test_a_run_leaves_the_callers_torch_settings(lab: Any) -> None:
    try:
        torch.set_num_threads(2)
        lab.run(**{"federation.rounds": 1, "engine.threads": 1})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
