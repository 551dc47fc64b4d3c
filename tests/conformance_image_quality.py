"""Conformance adapters of the data protocol with degraded images: partition and noise, both exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from conformance_methods import compare

from data_prep.corruption.degrade import degrade
from data_prep.partition import fedism_partition

Arrays = Mapping[str, Any]
Compared = list[tuple[str, float, float]]


def _legacy(arrays: Arrays) -> np.random.RandomState:
    return np.random.RandomState(int(arrays["in__legacy_seed"]))


def partition(arrays: Arrays) -> Compared:
    """Client of every sample and the counts of each client and class."""
    labels, alpha = np.asarray(arrays["in__labels"]), float(arrays["in__alpha"])
    clients, corrupted, classes = (int(arrays[f"in__num_{key}"]) for key in ("clients", "corrupted", "classes"))
    client = fedism_partition(labels, clients, corrupted, classes, alpha, _legacy(arrays))
    counts = np.zeros((clients, classes), dtype=np.int64)
    np.add.at(counts, (client, labels), 1)
    return compare(arrays, {"out__client_of_sample": client, "out__counts": counts}, 0.0)


def noise(arrays: Arrays) -> Compared:
    """A noisy image."""
    image = np.asarray(arrays["in__image"])
    noisy = degrade(image, "gaussian_noise", int(arrays["in__severity"]), _legacy(arrays))
    return compare(arrays, {"out__image": noisy}, 0.0)


ADAPTERS: dict[str, Callable[[Arrays], Compared]] = {
    "fedism__partition": partition,
    "fedism__gaussian_noise": noise,
}
