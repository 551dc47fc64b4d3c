"""Corruptions of training annotations. Each is a frozen dataclass of parameters with `apply(pool, seed) -> Corrupted`.

A corruption sees the pooled training items of all clients and nothing else: validation and test annotations stay clean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_prep.seeding import Seed


@dataclass(frozen=True)
class TrainPool:
    """Training items of all clients: N items, K clients, C classes.

    images (N, H, W[, channels]) as stored; targets (N,) int64 labels or (N, H, W) uint8 masks; client (N,) int64
    in [0, K); groups (N,) lesion, patient or case of each item; num_clients K; num_classes C; slices (N,) place of an
    image in the volume of its case, None where the file does not say.
    """

    images: np.ndarray
    targets: np.ndarray
    client: np.ndarray
    groups: np.ndarray
    num_clients: int
    num_classes: int
    slices: np.ndarray | None = None


@dataclass(frozen=True)
class Corrupted:
    """What a corruption returns: targets shaped and typed as in the pool, and one mapping of facts per client.

    Every mapping holds `is_noisy` (bool) and `noise_rate` (0..1, realised); the rest depends on the corruption.
    """

    targets: np.ndarray
    facts: tuple[Mapping[str, Any], ...]


class Corruption(Protocol):
    """A parametrised corruption of annotations; `tasks` are the kinds of site files it applies to."""

    tasks: tuple[str, ...]

    def apply(self, pool: TrainPool, seed: Seed) -> Corrupted:
        """Corrupt the pool; all randomness comes from `seed`."""
        ...
