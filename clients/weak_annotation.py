"""Training on weak masks: cross-entropy of the drawn pixels, and two terms that say something of all the others.

Sources: gated CRF loss, arXiv 1906.04651; tree energy loss, CVPR 2022, arXiv 2203.10739; summed as in FedICRA, arXiv
2304.05635 and its official code, of which this is the objective without its contrast between sites.
Symbols: z → logits, y → targets, I → image, h_m → side logits, pCE → term `pce`, L_CRF → `crf`, TEL → `tree`.

    L = pCE(z, y) + λ_crf L_CRF(softmax z, I) + λ_tree TEL(z, I; h_1, h_2, h_3)

y is open where nobody drew. Full masks have no open pixel: pCE is then plain cross-entropy and TEL is 0, so that runs on weak
and on full masks differ in the masks alone. Boxes are masks of rectangles here.

A prediction of one class everywhere makes L_CRF = TEL = 0, their least value. Only pCE keeps the network from it, hence a
site without any drawn pixel trains on nothing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor

from fedmed.data.split import Batch, Split
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.losses.gated_crf import Kernel, gated_crf
from fedmed.losses.partial import labelled_pixels, partial_cross_entropy
from fedmed.losses.tree_energy import Form, tree_energy_loss
from fedmed.models.output import Output
from fedmed.models.side_unet import SIDE_LOGITS, SideUNet

log = logging.getLogger("fedmed.site")


@dataclass(frozen=True)
class WeakParams:
    """Constants of the objective. The weights are 0, which leaves pCE alone; FedICRA has 0.1 for both."""

    crf_weight: float = 0.0  # λ_crf ≥ 0, weight of the gated CRF term (FedICRA: 0.1); 0: the term is left out
    crf_sigma_xy: float = 6.0  # σ_xy > 0 of its kernel, in pixels (official code)
    crf_sigma_rgb: float = 0.1  # σ_rgb > 0 of its kernel, for images in [0, 1] (official code)
    crf_radius: int = 5  # r ≥ 1, pixels compare with those at most r rows and columns away (official code)
    tree_weight: float = 0.0  # λ_tree ≥ 0, weight of the tree energy term (official code: 0.1); 0: left out
    tree_form: str = "cascade"  # filter by the side outputs: cascade, in turn (FedICRA) | single, the first | add, each
    tree_scale: int = 1  # s ≥ 1, of the tree term: at 1/s of the resolution, which costs s² times less (our option)

    def __post_init__(self) -> None:
        for name in ("crf_weight", "tree_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"a finite {name} >= 0 expected, got {getattr(self, name)}")
        for name in ("crf_sigma_xy", "crf_sigma_rgb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"a finite {name} > 0 expected, got {getattr(self, name)}")
        for name in ("crf_radius", "tree_scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} >= 1 expected, got {getattr(self, name)}")
        if self.tree_form not in get_args(Form):
            raise ValueError(f"tree_form: one of {', '.join(get_args(Form))} expected, got {self.tree_form!r}")


def unit_range(images: Tensor) -> Tensor:
    """Each image on its own scale: (I - min I) / (max I - min I), over pixels and channels together; a constant one is 0.

    images (B, K, *) of any scale and dtype, not modified. Out: the same shape, in [0, 1], float32 at least. Undoes one factor
    and one offset per image, such as a change of contrast or a `data.mean` and `data.std` of one number; with one per
    channel, channels keep their different stretch.
    """
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    inner = tuple(range(1, wide.ndim))
    low = wide.amin(dim=inner, keepdim=True)
    span = wide.amax(dim=inner, keepdim=True) - low
    return (wide - low) / span.masked_fill(span == 0, 1.0)


def side_logits(output: Output) -> list[Tensor]:
    """h_1, h_2, h_3 of a model that gives them, in the dtype of its logits. Raises `UserError`."""
    sides = (output.aux or {}).get(SIDE_LOGITS)
    if not sides:
        raise UserError(
            "the tree energy loss reads side outputs, which the model does not give; "
            "set model.name=side_unet and model.args=null, or client.args.tree_weight=0"
        )
    return [side.to(output.logits.dtype) for side in sides]


def weak_terms(output: Output, batch: Batch, ignore_value: int | None, params: WeakParams) -> dict[str, Tensor]:
    """The terms of L, weighted, by name: `pce`, then `crf` and `tree` if their weight is above 0.

    In: an output with logits (B, C, H, W), made in training mode where the tree term is wanted (the side outputs exist only
    then); targets (B, H, W), `ignore_value` where open, None: C. Out: scalars that add up to L. A batch without drawn pixel
    has pCE 0, one without open pixel TEL 0, both with gradient 0. Raises `UserError` for a model without side outputs.
    """
    logits = output.logits
    terms = {"pce": partial_cross_entropy(logits, batch.targets, ignore_value)}
    if params.crf_weight > 0 or params.tree_weight > 0:
        image = unit_range(batch.images)
    if params.crf_weight > 0:
        kernel = Kernel(sigma_xy=params.crf_sigma_xy, sigma_rgb=params.crf_sigma_rgb)
        terms["crf"] = params.crf_weight * gated_crf(logits.softmax(dim=1), image, (kernel,), params.crf_radius)
    if params.tree_weight > 0:
        unlabelled = ~labelled_pixels(batch.targets, logits.shape[1], ignore_value)
        form, sides = cast(Form, params.tree_form), side_logits(output)
        value = tree_energy_loss(logits, image, sides, unlabelled, form=form, scale=params.tree_scale)
        terms["tree"] = params.tree_weight * value
    return terms


def any_labelled(items: Split) -> bool:
    """Whether any pixel of a split is drawn; read from the compact masks, nothing is decoded."""
    if items.ignore_value is None:
        return len(items) > 0
    parts = items.target_blocks()
    return any(bool(labelled_pixels(part, items.num_classes, items.ignore_value).any()) for part in parts)


class WeakAnnotation(Client):
    """Trains on whatever a site has drawn: scribbles, points, blocks, boxes or full masks. Sends nothing beside the model."""

    Params: ClassVar[type] = WeakParams
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Refuse outputs that are no softmax; train on nothing where nothing is drawn. Raises `UserError`."""
        if self.activation != "softmax":
            raise UserError(
                f"client {self.config.client.name!r} reads softmax outputs, not {self.activation}; "
                "set model.activation=softmax"
            )
        if isinstance(self.model, SideUNet):
            self.model.give_sides = self.params.tree_weight > 0
        if not any_labelled(self.train_set):
            log.log(
                logging.WARNING if self.round <= 1 else logging.INFO,
                "site %s, round %d: no training image has a labelled pixel; the site trains on nothing, since without labels "
                "one class everywhere would have the least loss",
                self.site,
                self.round,
            )
            self.train_set = self.train_set.subset(torch.zeros(len(self.train_set), dtype=torch.bool))

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The terms of the objective."""
        return weak_terms(output, batch, self.train_set.ignore_value, self.params)
