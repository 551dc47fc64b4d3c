"""FedMix, local half: two networks whose agreement makes pseudo-labels, refined by boxes or tags where a site has them.

Source: "FedMix: Mixed Supervised Federated Learning for Medical Image Segmentation", IEEE TMI 2023, arXiv 2205.01840, and
its official code. `strategies/selected_loss.py` is the server, `fedmed/models/two_networks.py` the pair of networks.
Symbols: F foreground classes, f₁, f₂ → network 1 and 2, b(z) = 1[sigmoid(z) > 0.5] → binary, D → dice, e → EPS,
y₁, y₂ → first, second, TH → threshold. Supervision by `label_kind`: mask (labelled), box (bbox), image, none (unlabelled).
An image is taken if D(y₂, y₁) ≥ TH, and at a site with boxes D(y₁, box) ≥ box_dice_min; then f₁ learns y₂ and f₂ learns y₁.

Departures: a site that takes nothing does not train (official: it goes on with labels of an earlier round, or in the first
with its hidden masks). Selection reads images as stored, and image and pair are augmented together in every step
(official: selects augmented crops and trains on these). One optimiser steps both networks on the same batches (official:
an epoch and an optimiser each); the parameters are disjoint. Boxes are drawn once (official: at each access). Tags are
read with one class, too (official: with several only). Options of ours: `reject_empty`, `reject_empty_unlabelled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedmed.data.split import Batch, Split
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.federation.messages import Leaf
from fedmed.losses.segmentation import foreground_channels, soft_dice
from fedmed.models.output import Output, extra_inputs
from fedmed.models.two_networks import SECOND_LOGITS, TwoNetworks

EPS = 1e-4  # e, in numerator and denominator (official code)
KINDS = ("mask", "box", "image", "none")


@dataclass(frozen=True)
class SelectionRule:
    """What an image must meet to be taken, as the server sends it; see `strategies/selected_loss.py`."""

    threshold: float = 0.9
    box_dice_min: float = 0.5
    reject_empty: bool = True
    reject_empty_unlabelled: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SelectionRule:
        """Read the config of a message; what another rule does not send has its default."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})


class Selection(NamedTuple):
    """What became of B images: keep (B,) bool; first, second: y₁ and y₂ after refinement, (B, F, H, W) float32 0/1."""

    keep: Tensor
    first: Tensor
    second: Tensor


def dice(a: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    """D(a, b) = (2 Σ ab + e) / (Σ a + Σ b + e) over all channels and pixels of an image; two empty ones: 1.

    a, b (B, F, H, W) in [0, 1]. Out: (B,).
    """
    return soft_dice(a, b, smooth_numerator=eps, smooth_denominator=eps, pool_channels=True)


def dice_loss(prob: Tensor, target: Tensor, eps: float = EPS) -> Tensor:
    """1 − mean of D over the batch. Arguments as for `dice`. Out: scalar."""
    return 1 - dice(prob, target, eps).mean()


def binary(logits: Tensor) -> Tensor:
    """b(z): 1 where the sigmoid exceeds 0.5, else 0; shape and dtype stay."""
    return (logits.sigmoid() > 0.5).to(logits.dtype)


def at_least(score: Tensor, limit: float) -> Tensor:
    """Whether scores reach a limit, which is rounded to their type first (official code). (B,) → (B,) bool."""
    return score >= torch.tensor(limit, dtype=score.dtype, device=score.device)


def lacks(prediction: Tensor, known: Tensor) -> Tensor:
    """Whether a class that is known to be there is predicted nowhere. (B, F, H, W), (B, F, h, w) → (B,) bool."""
    found = prediction.flatten(2).any(dim=2)
    return (known.flatten(2).any(dim=2) & ~found).any(dim=1)


def select(logits1: Tensor, logits2: Tensor, kind: str, allowed: Tensor | None, rule: SelectionRule) -> Selection:
    """Pseudo-labels of both networks and which images are taken.

    logits (B, F, H, W) float32. allowed: 0/1 planes of where a class may be, for kind box (B, F, H, W), for image (B, F, H,
    W) or (B, F, 1, 1), else None.
    """
    first, second = binary(logits1), binary(logits2)
    if allowed is not None:
        first, second = first * allowed, second * allowed
    keep = at_least(dice(second, first), rule.threshold)
    if allowed is not None and kind == "box":
        keep &= at_least(dice(first, allowed), rule.box_dice_min)
    elif allowed is not None and rule.reject_empty:
        keep &= ~(lacks(first, allowed) | lacks(second, allowed))
    elif allowed is None and rule.reject_empty_unlabelled:
        keep &= first.flatten(1).any(dim=1) & second.flatten(1).any(dim=1)
    return Selection(keep, first, second)


def boxes_around(labels: Tensor, num_classes: int) -> Tensor:
    """Box around all pixels of each class: top, bottom, left, right, ends exclusive; zeros without a pixel, and background.

    labels (n, H, W) class ids; other values belong to no class. Out: (n, C, 4) int64.
    """
    boxes = torch.zeros(len(labels), num_classes, 4, dtype=torch.int64, device=labels.device)
    for label in range(1, num_classes):
        inside = labels == label
        for place, axis in ((0, 2), (2, 1)):
            line = inside.any(dim=axis)
            some, length = line.any(dim=1), line.shape[1]
            boxes[:, label, place] = torch.where(some, line.int().argmax(dim=1), 0)
            boxes[:, label, place + 1] = torch.where(some, length - line.flip(1).int().argmax(dim=1), 0)
    return boxes


def box_planes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, F, 4) as float32 0/1 planes (B, F, H, W); size (H, W)."""
    top, bottom, left, right = (limit.unsqueeze(2) for limit in boxes.unbind(dim=2))
    row, column = (torch.arange(length, device=boxes.device) for length in size)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).float()


class CrossPseudo(Client):
    """Trains both networks, on masks or on each other's pseudo-labels; needs two networks and sigmoid outputs.

    Keeps nothing but, with `optimizer.persist`, the moments of both. Memory at a weak site: 2 F bytes per pixel of the
    images it takes.
    """

    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("num_selected", "1", "number of training items with a mask or with a pseudo-label that was taken"),
        Leaf("num_total", "1", "number of training items"),
        Leaf("train_loss_net1", "1", "mean training loss of network 1 in the round"),
    )
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Choose what to train on. Raises `UserError` for an unfit model or another kind of annotation."""
        self._check()
        given, self.num_steps, self.loss_sum = self.train_set, 0, torch.zeros((), device=self.device)
        self.num_total, self.weak = len(given), self.data.label_kind != "mask"
        if self.weak:
            self.train_set = self.selected(given, SelectionRule.of(config))
        self.num_selected = len(self.train_set)

    def _check(self) -> None:
        """Refuse what the method cannot train or read. Raises `UserError`."""
        kind = self.data.label_kind
        if not hasattr(self.model, "second"):
            raise UserError(
                f"client 'fedmix' trains two networks, model {self.config.model.name!r} is one; set "
                "model.name=two_networks and model.args={name: <model>, args: {...}}"
            )
        if self.activation != "sigmoid":
            raise UserError(
                f"client 'fedmix' reads sigmoid outputs, not {self.activation}; set model.activation=sigmoid"
            )
        if kind not in KINDS:
            raise UserError(
                f"client 'fedmix' takes sites with masks, boxes, image tags or nothing (label_kind {', '.join(KINDS)}), "
                f"{self.site} has {kind}; leave the site out, or set strategy.name=fedavg client.name=weak"
            )
        if kind == "mask" and self.train_set.ignore_value is not None:
            raise UserError(
                f"{self.site}: mask annotation leaves pixels open, which client 'fedmix' cannot read; "
                "give it complete masks"
            )

    def selected(self, given: Split, rule: SelectionRule) -> Split:
        """The images of a weak site that are taken, with y₁ and y₂ in the place of targets: (m, 2 F, H, W) uint8.

        Both networks as received, in eval mode, see each image once, unaugmented.
        """
        kind, known, done = self.data.label_kind, self._known(given), 0
        keeps: list[Tensor] = []
        pairs: list[Tensor] = []
        for batch, output in self.sweep(given):
            rows = None if known is None else known[done : done + len(batch)]
            allowed = None
            if rows is not None:
                size = (output.logits.shape[2], output.logits.shape[3])
                allowed = box_planes(rows, size) if kind == "box" else (rows[:, :, None, None] > 0).float()
            found = select(output.logits, self._second(batch), kind, allowed, rule)
            keeps.append(found.keep)
            pairs.append(torch.cat((found.first, found.second), dim=1)[found.keep].byte())
            done += len(batch)
        return given.subset(torch.cat(keeps)).with_targets(torch.cat(pairs))

    def _second(self, batch: Batch) -> Tensor:
        """Logits of network 2, without gradient."""
        with torch.no_grad(), self.autocast():
            logits = cast(TwoNetworks, self.model).second(batch.images, **extra_inputs(self.model, batch.extras))
        return logits.float()

    def _known(self, given: Split) -> Tensor | None:
        """What is known of the items of a weak site: boxes (n, F, 4), tags (n, F), or None."""
        kind, classes = self.data.label_kind, self.data.num_classes
        if kind == "image":
            return self._rows("class_tags", self.data.read("class_tags"), given, (classes,))
        if kind != "box":
            return None
        try:
            boxes = self.data.read("class_boxes")
        except UserError:  # a file with filled boxes only
            return boxes_around(given.targets, classes)[:, 1:]
        return self._rows("class_boxes", boxes, given, (classes, 4))

    def _rows(self, name: str, values: np.ndarray[Any, Any], given: Split, shape: tuple[int, ...]) -> Tensor:
        """Foreground of a dataset of the site, the rows of these items. Raises `UserError` for another shape."""
        expected = (len(self.data.image), *shape)
        if values.shape != expected:
            raise UserError(
                f"{self.site}: {name} has shape {values.shape}, expected {expected} with background first; rewrite it"
            )
        return torch.from_numpy(values.astype(np.int64)).to(given.device)[given.index, 1:]

    def targets(self, labels: Tensor, num_foreground: int) -> tuple[Tensor, Tensor]:
        """What network 1 and network 2 learn, (B, F, H, W) float32: the mask (B, H, W), or from a pair the other's."""
        if not self.weak:
            mask = foreground_channels(labels, num_foreground)
            return mask, mask
        first, second = labels.float().chunk(2, dim=1)
        return second, first

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The terms net1 and net2: the Dice loss of each network."""
        assert output.aux is not None
        prob1, prob2 = output.logits.sigmoid(), output.aux[SECOND_LOGITS].float().sigmoid()
        target1, target2 = self.targets(batch.targets, prob1.shape[1])
        net1 = dice_loss(prob1, target1)
        self.loss_sum, self.num_steps = self.loss_sum + net1.detach(), self.num_steps + 1
        return {"net1": net1, "net2": dice_loss(prob2, target2)}

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Report how many images were taken, and the loss of network 1 if there was a step."""
        counts = {"num_selected": self.num_selected, "num_total": self.num_total}
        loss = {"train_loss_net1": float(self.loss_sum) / self.num_steps} if self.num_steps else {}
        return {}, {**counts, **loss}
