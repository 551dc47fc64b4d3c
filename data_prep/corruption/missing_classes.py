"""Missing classes as in FedMLP (MICCAI 2024, arXiv 2406.18995): each client annotates some of the classes only.

Symbols: K clients, C classes, AC_k the classes client k annotates (active), MC_k the others (missing), Y (n, C) labels.
A missing class is recorded as 0 at every training item, so its positives become false negatives; `active_classes` says
which zeros are annotation. Validation and test labels stay complete.
The published clients annotate one class each, client i class i, as many clients as classes. Departures: several classes
per client in a row; with fewer clients than classes the first ones are spread evenly, so that no class is left out as
long as K clients of that many classes can hold them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep.corruption import Corrupted, TrainPool
from data_prep.seeding import Rng, Seed
from fedmed.config import nearest
from fedmed.errors import UserError

PLACES = ("cyclic", "random")


def cyclic_classes(client: int, num_clients: int, num_classes: int, count: int) -> list[int]:
    """Classes s, s + 1, ..., counted round, of one client; `count` (0..C) of them, ascending.

    s = i for client i, and floor(i C / K) where there are fewer clients than classes. With K * count >= C every class is
    somewhere.
    """
    first = client if num_clients >= num_classes else client * num_classes // num_clients
    return sorted((first + step) % num_classes for step in range(count))


def random_classes(num_classes: int, count: int, rng: Rng) -> list[int]:
    """`count` (0..C) different classes drawn evenly, ascending."""
    return sorted(int(label) for label in rng.choice(num_classes, size=count, replace=False))


def hide(labels: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Y_obs = Y where active, else 0. In: labels (n, C) of 0/1, active (n, C) of 0/1. Out: as labels."""
    return np.where(active != 0, labels, 0).astype(labels.dtype)


@dataclass(frozen=True)
class MissingClasses:
    """`missing_classes`: clients that annotate some classes only; multi-label files.

    `annotated` names the classes of each client; else every client has as many, by `annotation_num` or `missing_rate`.
    """

    tasks: ClassVar[tuple[str, ...]] = ("multilabel",)
    annotated: list[list[str]] | None = None  # names or indices, one list per client, repeated, our option
    annotation_num: int | None = None  # |AC_k| in 1..C; None: 1, official code
    missing_rate: float | None = None  # |MC_k| / C in [0, 1) instead, rounded, at least one class stays; paper
    place: str = "cyclic"  # "cyclic" (client i has class i, official code) or "random" (any, drawn per client)
    seed: int | None = None  # legacy seed of "random"; None: from the run's seed

    def __post_init__(self) -> None:
        given = [name for name in ("annotated", "annotation_num", "missing_rate") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"need one of annotated, annotation_num and missing_rate, got {' and '.join(given)}")
        if self.annotated is not None and not (self.annotated and all(self.annotated)):
            raise ValueError(f"need a list of classes for each client, none of them empty, got {self.annotated}")
        if self.annotation_num is not None and self.annotation_num < 1:
            raise ValueError(f"need annotation_num >= 1, got {self.annotation_num}")
        if self.missing_rate is not None and not 0.0 <= self.missing_rate < 1.0:
            raise ValueError(f"need 0 <= missing_rate < 1, got {self.missing_rate}")
        if self.place not in PLACES:
            raise ValueError(f"need place = {' or '.join(PLACES)}, got {self.place!r}")

    def apply(self, pool: TrainPool, seed: Seed) -> Corrupted:
        """Labels with the missing classes at 0, and `active`: what was active before and is annotated by the rule.

        Facts: active_classes (indices; those active at any training item), n_missing (C less their number),
        n_positives, n_hidden, false_negative_rate (n_hidden / n_positives, 0 without any), noise_rate (the same),
        is_noisy (classes are missing, and there are items), missing_everywhere (indices of classes no client annotates).
        UserError: unknown classes, annotation_num above C.
        """
        chosen = self.active_sets(pool.num_clients, pool.num_classes, pool.classes, seed)
        flags = np.zeros((pool.num_clients, pool.num_classes), dtype=np.uint8)
        for client, labels in enumerate(chosen):
            flags[client, labels] = 1
        active = flags[pool.client]
        if pool.active is not None:
            active = active * (pool.active != 0)
            for client in np.unique(pool.client):
                flags[client] = active[pool.client == client].any(axis=0)
        given = hide(pool.targets, active)
        nowhere = np.flatnonzero(~flags.any(axis=0))
        facts = [
            {**_facts(pool.targets[rows], given[rows], flags[client]), "missing_everywhere": nowhere}
            for client in range(pool.num_clients)
            for rows in [np.flatnonzero(pool.client == client)]
        ]
        return Corrupted(given, tuple(facts), active.astype(np.uint8))

    def active_sets(self, num_clients: int, num_classes: int, classes: Sequence[str], seed: Seed) -> list[list[int]]:
        """AC_k of each client, ascending indices."""
        if self.annotated is not None:
            known = [sorted({_index(entry, classes, num_classes) for entry in entries}) for entries in self.annotated]
            return [known[client % len(known)] for client in range(num_clients)]
        count = 1 if self.annotation_num is None else self.annotation_num
        if self.missing_rate is not None:
            count = max(1, num_classes - round(self.missing_rate * num_classes))
        if count > num_classes:
            raise UserError(
                f"missing classes: annotation_num = {count}, but the file has {num_classes} classes. "
                "Set data.corruption.args.annotation_num."
            )
        if self.place == "cyclic":
            return [cyclic_classes(client, num_clients, num_classes, count) for client in range(num_clients)]
        shared = None if self.seed is None else seed.rng("missing_classes", self.seed)
        return [
            random_classes(num_classes, count, shared or seed.rng(f"missing_classes/{client}"))
            for client in range(num_clients)
        ]


def _index(entry: str, classes: Sequence[str], num_classes: int) -> int:
    """Index of a class given by its name or its index."""
    if str(entry) in classes:
        return list(classes).index(str(entry))
    if str(entry).isdecimal() and int(entry) < num_classes:
        return int(entry)
    raise UserError(
        f"missing classes: no class {entry!r}{nearest(str(entry), classes)}; indices are 0..{num_classes - 1}. "
        "Set data.corruption.args.annotated."
    )


def _facts(clean: np.ndarray, given: np.ndarray, flags: np.ndarray) -> dict[str, Any]:
    """Realised figures of one client; clean and given (n, C), flags (C,)."""
    positives, hidden = int((clean > 0).sum()), int(((clean > 0) & (given == 0)).sum())
    rate, missing = hidden / positives if positives else 0.0, int((flags == 0).sum())
    return {
        "is_noisy": bool(missing) and len(clean) > 0,
        "noise_rate": rate,
        "false_negative_rate": rate,
        "n_positives": positives,
        "n_hidden": hidden,
        "n_missing": missing,
        "active_classes": np.flatnonzero(flags),
    }
