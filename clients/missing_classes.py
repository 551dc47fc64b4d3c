"""FedMLP, local half: learn the annotated classes, and those the site does not annotate from prototypes and a teacher.

Source: "FedMLP: Federated Multi-Label Medical Image Classification under Task Heterogeneity", MICCAI 2024, arXiv
2406.18995, and its official code; see `strategies/missing_classes.py` for the server and `clients/prototype_tags.py` for
the equations of prototypes and pseudo-labels.
Symbols: AC / MC → annotated / missing classes, z, q → logits, prob, g → the received model in eval mode (teacher), π → prior,
L / U → lower / upper, r₀ / r₁ → negative_fraction / positive_fraction, G, d_G → proto, tau of the server.

Stage 1: BCE with the prior added to the logits on AC, squared distance to g on MC, mean over two augmented views. Stage 2:
tag items of MC by their distance to the prototypes; then one mean over all entries, BCE where there is a label or a tag,
squared distance to g elsewhere. A zero of a missing class is never read as a label.

Departures: prior adjustment and distillation are on, as published (official code: both switched off). Prototypes, degrees
and tags come from one ordered pass in eval mode without augmentation (official: shuffled, augmented). Positive tags do not
depend on the quota of the negative ones. Means run over actual batch sizes. Annotation is a matter of the item: a class
annotated in some items is active at the site; it has no degree here, and its other items are tagged and distilled. The two
views take two passes, as published: each has its own norm statistics, and add-ons see the first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clients import prototype_tags as maths
from clients.prototype_tags import Floats, Tags
from clients.supervised import Supervised
from fedmed.data.split import Batch, fingerprint
from fedmed.errors import UserError
from fedmed.federation.messages import Leaf
from fedmed.losses.multilabel import joint_terms, prior_shift, two_view_terms
from fedmed.models.output import Output

log = logging.getLogger("fedmed.site")

TAGS, SOURCE = "missing_classes/tags", "missing_classes/source"  # keys of the personal state


@dataclass(frozen=True)
class MissingClassesParams:
    """Constants of the local half; defaults are the official code's unless marked."""

    lower: float = 0.3  # L in [0, 1]: a probability below counts as sure
    upper: float = 0.7  # U in [L, 1]: a probability above counts as sure
    negative_fraction: float = 0.005  # r₀ in [0, 1], share of the candidates closer to "absent" tagged in a round
    positive_fraction: float = 0.01  # r₁ in [0, 1], share of the candidates closer to "present" tagged in a round
    threshold: str = "fixed"  # fixed: r as given | adaptive: min(1, r·d_G), our form of the paper's self-adaptive one
    min_quota: int = 0  # ≥ 0, tag at least so many a round, class and side, if there are (our option)
    prior_adjustment: bool = True  # add log π/(1 − π) to the logits in the BCE (paper; official code: off)
    prior_clip: float = 1e-6  # in (0, 0.5], least π and 1 − π (our choice)
    stage1_consistency: float = 1.0  # ≥ 0, weight of the teacher in stage 1 (the paper's figure shows none: 0)
    min_count: int = 5  # ≥ 1, with fewer items on a side the prototypes of a class are withheld (our option; 1: none)
    feature_clip: float = 0.0  # ≥ 0, largest norm of an item's features in a prototype; 0: no limit (our option)
    noise_std: float = 0.0  # ≥ 0, of the Gaussian noise on every prototype value that leaves (our option)

    def __post_init__(self) -> None:
        fractions = 0 <= self.negative_fraction <= 1 and 0 <= self.positive_fraction <= 1
        if not (0 <= self.lower <= self.upper <= 1 and fractions and self.threshold in ("fixed", "adaptive")):
            raise ValueError(
                f"0 <= lower <= upper <= 1, fractions in [0, 1], threshold fixed or adaptive expected, got {self}"
            )
        counts = self.min_quota >= 0 and self.min_count >= 1 and 0 < self.prior_clip <= 0.5
        if not counts or not all(0 <= v < np.inf for v in (self.stage1_consistency, self.feature_clip, self.noise_std)):
            raise ValueError(
                "min_quota >= 0, min_count >= 1, prior_clip in (0, 0.5], stage1_consistency, feature_clip and noise_std "
                f">= 0 and finite expected, got {self}"
            )


def pooled(output: Output) -> Tensor:
    """Features (B, D) of an output. Raises `UserError` for a model without."""
    if output.features is None or output.features.ndim != 2:
        raise UserError(
            "FedMLP needs a model that gives features (B, D), this one does not; take small_cnn for instance"
        )
    return output.features


class MissingClasses(Supervised):
    """Keeps the tags (1 byte an item and class) in the personal state; sends prototypes, degrees and numbers of tags."""

    Params: ClassVar[type] = MissingClassesParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("proto", "2C,D", "mean features by class and label; zeros: fewer than client.args.min_count", 1, "array"),
        Leaf("proto_count", "2C", "number of items behind each mean; 0: withheld or none", 1, "array"),
        Leaf("tau", "C", "share of items a class that is not annotated is predicted for with confidence", 1, "array"),
        Leaf("active", "C", "1 if the site annotates the class", 1, "array"),
        Leaf("n_pseudo_pos", "1", "number of positive pseudo-labels so far"),
        Leaf("n_pseudo_neg", "1", "number of negative pseudo-labels so far"),
    )
    tasks: ClassVar[tuple[str, ...]] = ("multilabel",)

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Tag with the received model in stage 2; set up labels, mask and prior of the round."""
        super().begin_round(config, extras)
        self.stage, self.collect = int(config.get("stage", 1)), bool(config.get("collect", 0))
        self.given = given = self.train_set
        flags, index = self.data.extras.get("active_classes"), given.index.cpu().numpy()
        self.annotated = maths.annotated_entries(flags, index, given.num_classes)
        self.labels = (given.targets.cpu().numpy() == 1) & self.annotated
        self.tags = self._kept()
        if self.stage == 2:
            if "proto" in extras:
                self.tags = self._tagged(extras)
            self.personal = {**self.personal, TAGS: torch.from_numpy(self.tags)}
        self.view_rng = self.rng("second view")
        self._prepare(self.tags if self.stage == 2 else np.zeros_like(self.tags), index)

    def _kept(self) -> Tags:
        """Tags of the rounds before, (n, C); none when the labels of the site are others now."""
        source, kept = fingerprint(self.given, self.annotated), self.personal.get(TAGS)
        known = self.personal.get(SOURCE, source)
        # Kept from the first round on, before there is any tag: then a site that lost its folder says so.
        self.personal = {**self.personal, SOURCE: source}
        if kept is not None and torch.equal(known, source) and tuple(kept.shape) == self.annotated.shape:
            return np.asarray(kept.numpy())
        if kept is not None:
            log.warning(
                "site %s, round %d: the pseudo-labels are dropped: other training items or labels than in the rounds before",
                self.site,
                self.round,
            )
        return np.zeros(self.annotated.shape, dtype=np.uint8)

    def _tagged(self, extras: dict[str, Tensor]) -> Tags:
        """The tags with those of this round. A class is left alone unless both its prototypes are known."""
        params, num_classes = self.params, self.annotated.shape[1]
        proto = extras["proto"].double().cpu().numpy()
        usable = (extras["proto_valid"].cpu().numpy() != 0).reshape(num_classes, 2).all(axis=1)
        usable &= ~self.annotated.all(axis=0)
        if not usable.any():
            return self.tags
        fractions = np.tile([[params.negative_fraction], [params.positive_fraction]], num_classes)
        if params.threshold == "adaptive":
            degrees = extras["tau"].tolist()
            fractions = np.array([[maths.adaptive_fraction(r, d) for d in degrees] for r in fractions[:, 0]])
        features, _ = self._measured()
        difference = maths.similarity_difference(features, proto)
        return maths.add_tags(self.tags, self.annotated, difference, usable, fractions, params.min_quota)

    def _measured(self) -> tuple[Floats, Floats]:
        """Features (n, D) and probabilities (n, C) of the training items, by the model as it is now."""
        found = [(pooled(o).float().cpu(), o.logits.sigmoid().cpu()) for _, o in self.sweep(self.given)]
        features, prob = (torch.cat(part).double().numpy() for part in zip(*found, strict=True))
        return features, prob

    def _prepare(self, tags: Tags, index: Any) -> None:
        """What the loss reads: labels with pseudo-labels, the mask of supervised entries by place in the site, the shift."""
        targets = self.labels | (tags == maths.POSITIVE)
        self.train_set = self.given.with_targets(torch.from_numpy(targets.astype(np.uint8)))
        supervised = np.zeros((len(self.data.image), targets.shape[1]), dtype=bool)
        supervised[index] = self.annotated | (tags != maths.NONE)
        self.supervised = torch.from_numpy(supervised).to(self.device)
        prior = torch.from_numpy(maths.class_prior(self.labels, self.annotated, tags))
        shift = prior_shift(prior, self.params.prior_clip).float().to(self.device)
        self.shift = shift if self.params.prior_adjustment else None
        self.asks_teacher = not self.annotated.all() and (self.stage == 2 or self.params.stage1_consistency > 0)

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """Stage 1: two views; stage 2: one, with pseudo-labels. The teacher sees the same augmented images."""
        pooled(output)
        use = self.supervised.index_select(0, batch.index)
        if self.stage == 2:
            teacher = self.teacher(batch.images, batch.extras).logits if self.asks_teacher else output.logits.detach()
            return joint_terms(output.logits, teacher, batch.targets, use, self.shift)
        images, _ = self.augment(batch.source, None, self.view_rng)
        second = Batch(images, batch.targets, batch.index, extras=batch.extras)
        logits = [output.logits, self.forward(second).logits]
        views = (batch.images, images) if self.asks_teacher else ()
        teachers = [self.teacher(view, batch.extras).logits for view in views]
        return two_view_terms(logits, teachers, batch.targets, use, self.shift, self.params.stage1_consistency)

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send the numbers of tags and, when asked, what the trained model finds: prototypes, counts, degrees."""
        pseudo = {"n_pseudo_pos": int((self.tags == maths.POSITIVE).sum())}
        pseudo["n_pseudo_neg"] = int((self.tags == maths.NEGATIVE).sum())
        if not self.collect:
            return {}, pseudo
        features, prob = self._measured()
        features = maths.clip_norms(features, self.params.feature_clip)
        found, counts = maths.local_prototypes(features, self.labels, self.annotated)
        proto, counts = maths.withhold(found, counts, self.params.min_count)
        noise = self.params.noise_std * torch.randn(proto.shape, generator=self.rng("prototype noise"))
        released = torch.from_numpy(counts > 0)[:, None]
        active = self.annotated.any(axis=0)
        degrees = np.where(active, 0.0, maths.learning_degrees(prob, self.params.lower, self.params.upper))
        arrays = {
            "proto": torch.from_numpy(proto).float() + torch.where(released, noise, torch.zeros_like(noise)),
            "proto_count": torch.from_numpy(counts),
            "tau": torch.from_numpy(degrees).float(),
            "active": torch.from_numpy(active.astype(np.uint8)),
        }
        return arrays, pseudo
