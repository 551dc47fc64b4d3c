"""Weak annotation in the place of full masks: points, scribbles, blocks, boxes, image tags, or another kind at each site.

FedICRA (arXiv 2304.05635) and FedLPPA (arXiv 2402.17502): each site draws points, scribbles, noisy scribbles, blocks or
boxes. FedMix (arXiv 2205.01840): each has masks, boxes, image tags or nothing. Symbols: C classes, K clients.
Departures: the first two published labels, not the rules they were made with; those in `weak_marks` are our choice. Boxes
of FedMix have margins that are drawn anew whenever an image is read; here they are drawn once.
Order of draws, in a generator of each client's own: image by image in the order of the pool, then as in `weak_marks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep.corruption import TrainPool, WeakSite
from data_prep.corruption.weak_marks import (
    block_marks,
    box_labels,
    class_boxes,
    class_tags,
    drawn_boxes,
    filled_boxes,
    point_marks,
    scribble_marks,
)
from data_prep.seeding import Rng, Seed
from fedmed.config import nearest
from fedmed.errors import UserError

KINDS = ("mask", "point", "scribble", "noisy_scribble", "block", "box", "image", "none", "keep")


@dataclass(frozen=True)
class WeakLabels:
    """`weak_labels`: parameters of the weak annotation; segmentation files only.

    Lengths in pixels of the derived (resized) image.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    kind: str | list[str] = "scribble"  # one kind, or those of clients 0, 1, ..., repeated
    points: int = 1  # point: per component, the first at its most interior pixel, >= 1, our choice
    point_radius: float = 1.0  # point: of the discs, >= 0; 0: single pixels, our choice
    background_points: int = 4  # point: discs on background, >= 0, our choice
    stroke_fraction: float = 0.8  # scribbles: share of a line that is drawn, (0, 1], our choice
    stroke_width: int = 1  # scribbles: odd, our choice; 1 gives as many pixels as people draw at 128 x 128
    shake: float = 3.0  # noisy_scribble: largest displacement, > 0, our choice
    block_share: float = 0.5  # block: share of each side of the largest rectangle inside, (0, 1], our choice
    box_per: str = "component"  # box: or "class" (one around all components, FedMix)
    margin_low: int = 0  # box: pixels between object and box, per side drawn evenly, >= 0; FedMix 1, at 224 pixels
    margin_high: int = 0  # box: upper end, >= low; FedMix 9
    seed: int | None = None  # of the draws; None: from the run's seed

    def __post_init__(self) -> None:
        for kind in self.kinds or ("",):
            if kind not in KINDS:
                raise ValueError(f"need a kind of weak label, or a list of them, got {kind!r}{nearest(kind, KINDS)}")
        if self.points < 1 or self.background_points < 0 or not 0 <= self.point_radius < float("inf"):
            raise ValueError(
                "need points >= 1, background_points >= 0 and point_radius >= 0, got "
                f"{self.points}, {self.background_points} and {self.point_radius}"
            )
        if not 0.0 < self.stroke_fraction <= 1.0 or not 0.0 < self.block_share <= 1.0:
            raise ValueError(
                "need 0 < stroke_fraction <= 1 and 0 < block_share <= 1, got "
                f"{self.stroke_fraction} and {self.block_share}"
            )
        if self.stroke_width < 1 or self.stroke_width % 2 == 0 or not 0 < self.shake < float("inf"):
            raise ValueError(f"need an odd stroke_width >= 1 and shake > 0, got {self.stroke_width} and {self.shake}")
        if self.box_per not in ("component", "class") or not 0 <= self.margin_low <= self.margin_high:
            raise ValueError(
                "need box_per = component or class and 0 <= margin_low <= margin_high, got "
                f"{self.box_per!r}, {self.margin_low} and {self.margin_high}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of clients 0, 1, ..., before they are repeated."""
        return (self.kind,) if isinstance(self.kind, str) else tuple(self.kind)

    def annotate(self, pool: TrainPool, seed: Seed) -> tuple[WeakSite, ...]:
        """Weak labels of every client; its draws depend on no other client.

        Facts: label_kind, drawn_fraction (labelled pixels of all), drawn_per_class (C,) (pixels labelled c of those that
        are c; 0 where none is), n_items_without_foreground_mark (images in which no object pixel is labelled), noise_rate
        (labelled pixels that contradict the mask, of those the mask says something about), is_noisy (False: weak, not to
        be distrusted). Client "image" has class_tags (n, C) besides, client "box" class_boxes (n, C, 4). UserError:
        "keep" without anything to keep.
        """
        base = seed if self.seed is None else Seed(self.seed)
        sites = []
        for client in range(pool.num_clients):
            kind = self.kinds[client % len(self.kinds)]
            items = np.flatnonzero(pool.client == client)
            masks = pool.targets[items]
            if kind == "keep":
                name, given = _kept(pool, client, items)
                sites.append(WeakSite(name, name, None, _facts(name, masks, given, pool.num_classes)))
                continue
            given, extras = masks, dict[str, np.ndarray]()
            if kind != "mask":
                given, extras = self._drawn(kind, masks, pool.num_classes, base.rng(f"weak_labels/{client}"))
            facts = _facts(kind, masks, given, pool.num_classes)
            dataset = kind if kind in ("mask", "box") else "scribble"
            sites.append(WeakSite(dataset, kind, given if kind != "mask" else None, facts, extras))
        return tuple(sites)

    def _drawn(
        self, kind: str, masks: np.ndarray, num_classes: int, rng: Rng
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Weak labels (n, H, W) uint8 of one client, and the datasets that come with them."""
        given = np.empty(masks.shape, dtype=np.uint8)
        if kind != "box":
            for place, mask in enumerate(masks):
                given[place] = self.draw(kind, mask, num_classes, rng)
            return given, {"class_tags": class_tags(masks, num_classes)} if kind == "image" else {}
        around = np.zeros((len(masks), num_classes, 4), dtype=np.int16)
        for place, mask in enumerate(masks):
            boxes = drawn_boxes(mask, num_classes, rng, self.box_per, (self.margin_low, self.margin_high))
            given[place], around[place] = filled_boxes(mask, num_classes, boxes), class_boxes(boxes, num_classes)
        return given, {"class_boxes": around}

    def draw(self, kind: str, mask: np.ndarray, num_classes: int, rng: Rng) -> np.ndarray:
        """Weak labels (H, W) uint8 of one image from its mask (H, W), C where nothing is drawn; kind: what is drawn here."""
        if kind == "point":
            return point_marks(mask, num_classes, rng, self.points, self.point_radius, self.background_points)
        if kind in ("scribble", "noisy_scribble"):
            shake = self.shake if kind == "noisy_scribble" else 0.0
            return scribble_marks(mask, num_classes, rng, self.stroke_fraction, self.stroke_width, shake)
        if kind == "block":
            return block_marks(mask, num_classes, rng, self.block_share)
        if kind == "box":
            return box_labels(mask, num_classes, rng, self.box_per, (self.margin_low, self.margin_high))
        return np.full(mask.shape, num_classes, dtype=np.uint8)


def _kept(pool: TrainPool, client: int, items: np.ndarray) -> tuple[str, np.ndarray]:
    """Dataset and labels (n, H, W) of the weak annotation a client has already."""
    name = pool.weak_in[client] if pool.weak_in else ""
    if pool.weak is None or not name:
        raise UserError(
            f"weak labels: client {client} has no scribble or box to keep. Set data.corruption.args.kind to what is to be "
            "drawn there."
        )
    return name, pool.weak[items]


def _facts(kind: str, masks: np.ndarray, given: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Realised figures of one client; masks and given (n, H, W)."""
    drawn, known = given < num_classes, masks < num_classes
    judged = int((drawn & known).sum())
    counts = [np.bincount(part.ravel(), minlength=num_classes + 1)[:num_classes] for part in (given, masks)]
    return {
        "label_kind": kind,
        "is_noisy": False,
        "noise_rate": float((given != masks)[drawn & known].sum() / judged) if judged else 0.0,
        "drawn_fraction": float(drawn.mean()) if drawn.size else 0.0,
        "drawn_per_class": counts[0] / np.maximum(counts[1], 1) * (counts[1] > 0),
        "n_items_without_foreground_mark": int((~(drawn & (given > 0)).any(axis=(1, 2))).sum()),
    }
