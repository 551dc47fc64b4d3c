"""Generators depend on their key and on nothing else."""

from __future__ import annotations

import itertools

import torch

from fedmed.federation.seeding import derive_seed, numpy_rng, torch_rng


def test_fixed_value() -> None:
    # Written down once: a change would make every stored result stale.
    assert derive_seed(0, 1, "a", "batches") == 8401351261907933962


def test_every_part_of_the_key_counts() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 11), ("", "a", "1"), ("x", "y")))
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_same_key_same_numbers_and_the_global_generators_stay() -> None:
    before = torch.random.get_rng_state()
    first, second = (torch.rand(3, generator=torch_rng(1, 2, "s", "p")) for _ in range(2))
    assert torch.equal(first, second)
    assert numpy_rng(1, 2, "s", "p").random() == numpy_rng(1, 2, "s", "p").random()
    assert numpy_rng(1, 2, "s", "p").random() != numpy_rng(1, 2, "t", "p").random()
    assert torch.equal(before, torch.random.get_rng_state())
