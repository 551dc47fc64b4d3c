"""Corruptions of training annotations and of images. Each is a frozen dataclass of parameters.

A corruption of annotations has `apply(pool, seed) -> Corrupted`. It sees the pooled training items of all clients and
nothing else: validation and test annotations stay clean. A corruption of images has `apply_images(sites, central, seed)
-> Degraded`. It sees images of all splits, not annotations: a poor device is poor for every patient. Weak annotation has
`annotate(pool, seed) -> tuple of WeakSite`: training then reads another dataset, and the full masks are withheld from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from data_prep.seeding import Seed


@dataclass(frozen=True)
class TrainPool:
    """Training items of all clients: N items, K clients, C classes.

    images (N, H, W[, channels]) as stored; targets (N,) int64 labels or (N, H, W) uint8 masks; client (N,) int64
    in [0, K); groups (N,) lesion, patient or case of each item; num_clients K; num_classes C; slices (N,) place of an
    image in the volume of its case, None where the file does not say; active (N, C) of 0/1, which classes an item is
    annotated for, None: for all; classes (C,) names. Multi-label targets are (N, C) of 0/1. weak (N, H, W) uint8: the weak
    annotation the file has already, C where nothing is drawn, None where no client has any; weak_in: name of its dataset
    per client, "" without one.
    """

    images: np.ndarray
    targets: np.ndarray
    client: np.ndarray
    groups: np.ndarray
    num_clients: int
    num_classes: int
    slices: np.ndarray | None = None
    active: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    weak: np.ndarray | None = None
    weak_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corrupted:
    """What a corruption returns: targets shaped and typed as in the pool, and one mapping of facts per client.

    Every mapping holds `is_noisy` (bool) and `noise_rate` (0..1, realised); the rest depends on the corruption: numbers,
    strings and NumPy arrays. active (N, C) of 0/1: which classes the items are annotated for now; None: as before.
    """

    targets: np.ndarray
    facts: tuple[Mapping[str, Any], ...]
    active: np.ndarray | None = None


class Corruption(Protocol):
    """A parametrised corruption of annotations; `tasks` are the kinds of site files it applies to."""

    tasks: tuple[str, ...]

    def apply(self, pool: TrainPool, seed: Seed) -> Corrupted:
        """Corrupt the pool; all randomness comes from `seed`."""
        ...


@dataclass(frozen=True)
class ImageStack:
    """Images of a client, or the central ones: images (N, H, W[, C]) as stored; present (N, C) of 0/1, which channels an
    image really has, None where the file does not say; groups (N,) lesion, patient or case of each image; train (n,)
    places of the training items.
    """

    images: np.ndarray
    present: np.ndarray | None = None
    groups: np.ndarray | None = None
    train: np.ndarray | None = None


@dataclass(frozen=True)
class Degraded:
    """What a corruption of images returns: per client its images, shaped and typed as they came, or None where they are
    as they were, and one mapping of facts (as in `Corrupted`); central: the degraded central images, None without such;
    present: per client which channels its images have now, (N, C) uint8, None: as before.
    """

    images: tuple[np.ndarray | None, ...]
    facts: tuple[Mapping[str, Any], ...]
    central: np.ndarray | None = None
    present: tuple[np.ndarray, ...] | None = None


@runtime_checkable
class ImageCorruption(Protocol):
    """A parametrised corruption of images; `tasks` are the kinds of site files it applies to."""

    tasks: ClassVar[tuple[str, ...]]

    def apply_images(self, sites: Sequence[ImageStack], central: ImageStack | None, seed: Seed) -> Degraded:
        """Degrade images of some clients, and all of `central`; all randomness comes from `seed`."""
        ...


@dataclass(frozen=True)
class WeakSite:
    """What training reads at one client with n training items from now on.

    annotation: name of the dataset ("scribble", "box"; "mask": the full masks stay); label_kind: how it was made; targets
    (n, H, W) uint8, C where nothing is drawn, None: what the file has under that name stays; extras: further arrays
    (n, ...) of the training items; facts as in `Corrupted`.
    """

    annotation: str
    label_kind: str
    targets: np.ndarray | None
    facts: Mapping[str, Any]
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)


@runtime_checkable
class WeakAnnotation(Protocol):
    """Parametrised weak annotation in the place of full masks; `tasks` are the kinds of site files it applies to."""

    tasks: ClassVar[tuple[str, ...]]

    def annotate(self, pool: TrainPool, seed: Seed) -> tuple[WeakSite, ...]:
        """Weak labels of every client from its full masks; all randomness comes from `seed`."""
        ...
