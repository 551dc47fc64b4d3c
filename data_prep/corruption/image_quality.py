"""Image quality as in FedISM (IJCAI 2024, arXiv 2404.17805): a few sites have degraded images, the others clean ones.

Symbols: K clients, K_c num_corrupted, s severity 1..5. A poor device degrades all that passes through it, so training,
validation and test images of a corrupted client are degraded, once, and stored; annotations stay. The pooled test items
exist clean and degraded.
Departures from the published data: more kinds than noise (see `degrade`); the severity may differ between clients; the
corrupted clients need not be the last ones; their own validation and test images, which the published clients do not
have, follow their training images in the stream of draws; the degraded central items are drawn directly at their
severity (published: after those of lower severities, from one generator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep.corruption import Degraded, ImageStack
from data_prep.corruption.degrade import check, degrade, mean_abs_error
from data_prep.seeding import Rng, Seed
from fedmed.errors import UserError

PLACES = ("last", "random")


def corrupted_clients(num_clients: int, num_corrupted: int, which: str | Sequence[int], rng: Rng) -> list[int]:
    """Ascending indices of the corrupted clients: the last K_c, K_c drawn at random, or those given.

    0 <= K_c <= K; given indices 0..K-1, each once, else UserError. Only "random" draws.
    """
    if not 0 <= num_corrupted <= num_clients:
        raise UserError(
            f"image quality: expected 0 <= num_corrupted <= {num_clients} (the clients of the partition), got "
            f"{num_corrupted}. Set data.corruption.args.num_corrupted."
        )
    if not isinstance(which, str):
        chosen = sorted(which)
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(num_clients)):
            raise UserError(
                f"image quality: expected different client indices 0..{num_clients - 1}, got {list(which)}. "
                "Set data.corruption.args.which."
            )
        return chosen
    if which == "random":
        return sorted(rng.choice(num_clients, size=num_corrupted, replace=False).tolist())
    return list(range(num_clients - num_corrupted, num_clients))


def degrade_stack(stack: ImageStack, kind: str, severity: int, rng: Rng) -> tuple[np.ndarray, float]:
    """All images of a stack degraded, in stored order, and the mean absolute error on the 0..1 scale (0: no images).

    Out: images shaped and typed as in the stack. Channels an image does not have stay as stored.
    """
    result = stack.images.copy()
    errors = []
    for index, image in enumerate(stack.images):
        poor = degrade(image, kind, severity, rng)
        if stack.present is not None:
            poor = np.where(stack.present[index].astype(bool), poor.reshape(*image.shape[:2], -1), _planes(image))
        result[index] = poor.reshape(image.shape)
        errors.append(mean_abs_error(image, result[index]))
    return result, float(np.mean(errors)) if errors else 0.0


@dataclass(frozen=True)
class ImageQuality:
    """`image_quality`: degraded images at some of the clients; files of every task.

    All images of a corrupted client are degraded. With seed None each client has a generator of its own, from the run's
    seed; a number gives the published stream: one legacy generator for the corrupted clients in ascending order.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification", "multilabel", "segmentation")
    kind: str = "gaussian_noise"  # gaussian_noise (paper), gaussian_blur, motion_blur, contrast, jpeg or resolution
    severity: int | list[int] = 3  # s in 1..5, official code; a list: one per corrupted client, by index
    num_corrupted: int | None = None  # K_c, 0..K; official code 4 of 20 clients
    corrupted_fraction: float = 0.2  # K_c / K, [0, 1], official code; rounded; used where num_corrupted is None
    which: str | list[int] = "last"  # "last" (official code), "random", or indices from 0 of the corrupted clients
    test_severity: int | None = None  # s of the degraded central items, 1..5; None: severity (of a list the largest)
    seed: int | None = None  # legacy seed of the draws; 0 in the official code; None: from the run's seed

    def __post_init__(self) -> None:
        severities = self.severity if isinstance(self.severity, list) else [self.severity]
        if not severities:
            raise ValueError("expected a severity of 1..5, or one per corrupted client, got an empty list")
        for severity in [*severities, *([] if self.test_severity is None else [self.test_severity])]:
            check(self.kind, severity)
        if not 0.0 <= self.corrupted_fraction <= 1.0:
            raise ValueError(f"expected 0 <= corrupted_fraction <= 1, got {self.corrupted_fraction}")
        if isinstance(self.which, str) and self.which not in PLACES:
            raise ValueError(f"expected which = {', '.join(PLACES)} or a list of client indices, got {self.which!r}")

    def clients(self, num_clients: int, seed: Seed) -> dict[int, int]:
        """Severity of each corrupted client by its index, ascending; UserError when the numbers do not agree."""
        number = self.num_corrupted
        if number is None and not isinstance(self.which, str):
            number = len(self.which)
        if number is None:
            number = round(self.corrupted_fraction * num_clients)
        base = seed if self.seed is None else Seed(self.seed)
        chosen = corrupted_clients(num_clients, number, self.which, base.rng("image_quality/which"))
        severities = self.severity if isinstance(self.severity, list) else [self.severity] * len(chosen)
        if len(chosen) != number or len(severities) != len(chosen):
            raise UserError(
                f"image quality: num_corrupted = {number}, but which names {len(chosen)} clients and severity has "
                f"{len(severities)} entries. Make them agree in data.corruption.args."
            )
        return dict(zip(chosen, severities, strict=True))

    def apply_images(self, sites: Sequence[ImageStack], central: ImageStack | None, seed: Seed) -> Degraded:
        """Degraded images; facts: is_noisy (corrupted, and has images), noise_rate (share of degraded images: 1 or 0),
        quality_kind, severity (0: clean), mean_abs_error (realised, 0..1 scale)."""
        severity = self.clients(len(sites), seed)
        shared = None if self.seed is None else seed.rng("image_quality", self.seed)
        images: list[np.ndarray | None] = []
        facts: list[dict[str, Any]] = []
        for client, stack in enumerate(sites):
            poor, error, used = None, 0.0, severity.get(client, 0) if len(stack.images) else 0
            if used:
                rng = seed.rng(f"image_quality/{client}") if shared is None else shared
                poor, error = degrade_stack(stack, self.kind, used, rng)
            images.append(poor)
            facts.append(
                {
                    "is_noisy": used > 0,
                    "noise_rate": float(used > 0),
                    "quality_kind": self.kind if used else "clean",
                    "severity": used,
                    "mean_abs_error": error,
                }
            )
        if central is None:
            return Degraded(tuple(images), tuple(facts))
        test = self.test_severity
        if test is None:
            test = max(self.severity) if isinstance(self.severity, list) else self.severity
        rng = seed.rng("image_quality/central", self.seed)
        return Degraded(tuple(images), tuple(facts), degrade_stack(central, self.kind, test, rng)[0])


def _planes(image: np.ndarray) -> np.ndarray:
    return image.reshape(*image.shape[:2], -1)
