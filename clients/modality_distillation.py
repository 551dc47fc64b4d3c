"""PASSION, local half: every available modality alone learns from all of them together, by pixel and by class prototype.

Source: Shi et al., "PASSION: Towards Effective Incomplete Multi-Modal Medical Image Segmentation with Imbalanced Missing
Rates", ACM MM 2024, arXiv 2407.14796, and its official code, made for one data set; the federated use is ours.
`strategies/modality_balance.py` is the server, `fedmed/losses/{distillation,balance,weighted_segmentation}.py` the terms.
Symbols: M modalities, c_n → present (B, M), fused pass → teacher, pass with modality m alone → student m, L_sep → single,
L_pix → pixel, L_proto → semantic, L_prm → deep, D^m → distance, a → gate, v → frequency, β → beta, N_k^m → counts.
L = L_fuse + L_prm + Σ_m c a β v L_sep + pixel_weight Σ c β v L_pix + semantic_weight Σ c a v L_proto.

Departures: L_fuse and L_prm are means over the batch (published: sums, at batch size 1); as v counts steps the other
terms are means already, and the balance between them no longer hangs on the batch size. Images without any modality are
left out of training. Not taken over: training on complete data (`pdt`) and the warm-up of the uni-modal decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fedmed.data.loader import num_batches
from fedmed.data.split import Batch, Split
from fedmed.errors import UserError
from fedmed.federation.client import Client
from fedmed.federation.messages import Leaf
from fedmed.losses import balance, distillation
from fedmed.losses.weighted_segmentation import class_masks, deep_ce_dice, weighted_ce_dice
from fedmed.models.multi_encoder_unet import only
from fedmed.models.output import Output

PRESENT = "modality_present"
BETA, ETA, UPDATES = "balance/beta", "balance/eta", "balance/updates"  # keys of the personal state


@dataclass(frozen=True)
class ModalityDistillationParams:
    """Constants of the local half; defaults are the official code's unless marked."""

    mode: str = "passion"  # passion | plain: L_fuse + L_prm alone, the same network and losses for comparison (ours)
    drop: str = "none"  # none: modalities as stored | random: a random non-empty part of them in every step
    beta: str = "shared"  # shared: β of the server | local: a β of the site's own
    temperature: float = 4.0  # T > 0, divides the logits of L_pix
    pixel_weight: float = 0.5  # ≥ 0, weight of L_pix
    semantic_weight: float = 0.1  # ≥ 0, weight of L_proto
    supervision: str = "mean"  # L_fuse and L_prm over the batch: mean (ours) | sum (official)

    def __post_init__(self) -> None:
        words = (self.mode, self.drop, self.beta, self.supervision)
        allowed = (("passion", "plain"), ("none", "random"), ("shared", "local"), ("mean", "sum"))
        known = all(word in choice for word, choice in zip(words, allowed, strict=True))
        if not (known and self.temperature > 0 and self.pixel_weight >= 0 and self.semantic_weight >= 0):
            raise ValueError(
                "mode passion or plain, drop none or random, beta shared or local, supervision mean or sum, "
                f"temperature > 0 and weights >= 0 expected, got {self}"
            )


class MultiEncoder(Protocol):
    """What the client needs of a model, see `fedmed.models.multi_encoder_unet`."""

    def encode(self, images: Tensor, present: Tensor | None = None) -> list[Tensor]:
        """Maps of every modality at every level."""

    def decode(self, levels: Sequence[Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, features and side logits of the modalities that are present."""

    def decode_single(self, levels: Sequence[Tensor], modality: int) -> Tensor:
        """Logits of the uni-modal decoder."""


class ItemLosses(NamedTuple):
    """Terms of each image and modality, (B, M); what stands for a modality that an image lacks is not to be read."""

    single: Tensor
    pixel: Tensor
    semantic: Tensor
    distance: Tensor


def random_part(present: Tensor, rng: torch.Generator) -> Tensor:
    """A non-empty part of the available modalities of each item, all parts equally likely. (B, M) bool → (B, M) bool.

    The 2^j - 1 parts of j modalities are numbered from 1; bit i of a number says whether the i-th available one stays.
    """
    count = present.sum(dim=1)
    drawn = torch.rand(len(present), generator=rng, dtype=torch.float64).to(present.device)
    number = (drawn * (2.0**count - 1)).long() + 1
    place = (present.long().cumsum(dim=1) - 1).clamp_min(0)
    return present & ((number.unsqueeze(1) >> place) & 1).bool()


def site_distances(distance_sum: Tensor, num_seen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """S_k^m and N_k^m: sum of D^m over the training items having m, one pass over the data, and their number.

    In: sum and number of the D^m of a round, N_k^m, each (M,). S = N · mean D, so that epochs, steps that were cut off
    and dropped modalities do not change its scale. A modality that no step has seen: 0 and 0. Out: float32, int64.
    """
    seen = num_seen > 0
    sums = torch.where(seen, counts * distance_sum / num_seen.clamp_min(1), 0.0)
    return sums.float(), torch.where(seen, counts, 0)


class ModalityDistillation(Client):
    """Trains fused output, side outputs and the students; sends how far its students are from the teacher on average.

    Keeps nothing, or with `beta: local` β, η and the number of updates. A step decodes 1 + 2 M times and encodes once.
    """

    Params: ClassVar[type] = ModalityDistillationParams
    leaves: ClassVar[tuple[Leaf, ...]] = (
        Leaf("distance_sum", "M", "distance of each modality from the fusion, summed over the items", 1, "array"),
        Leaf("modality_count", "M", "number of training items having the modality", 1, "array"),
    )
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    drops: torch.Generator | None = None  # of the modalities to drop, while a round is trained

    def begin_round(self, config: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Count who has what, leave out images without any modality, take β. Raises `UserError` for an unfit model or data."""
        self._check()
        present = self._presence(self.train_set)
        keep = present.any(dim=1)
        if not bool(keep.all()):
            self.train_set, present = self.train_set.subset(keep), present[keep]
        self.counts = present.sum(dim=0)
        self.at_site = [bool(count) for count in self.counts]
        steps = num_batches(len(self.train_set), self.config.training.batch_size)
        self.frequency = balance.frequency_weights(steps, self.counts).float()
        self.asked = "beta" in extras
        self.beta = self._beta(extras).to(self.device, torch.float32)
        self.distance_sum, self.num_seen = (self.frequency.new_zeros(len(self.counts)) for _ in range(2))
        self.drops = self.rng("modality_drop") if self.params.drop == "random" else None

    def _check(self) -> None:
        """Refuse what the terms cannot read. Raises `UserError`."""
        if not all(hasattr(self.model, name) for name in ("encode", "decode", "decode_single")):
            raise UserError(
                f"client 'passion' needs a model with one encoder per modality, not {self.config.model.name}; "
                "set model.name=multi_encoder_unet"
            )
        if self.activation != "softmax":
            raise UserError(
                f"client 'passion' reads softmax outputs, not {self.activation}; set model.activation=softmax"
            )
        if self.train_set.ignore_value is not None:
            raise UserError(
                f"{self.data.label_kind} annotation leaves pixels open, which client 'passion' cannot read; it needs full masks"
            )

    def _presence(self, items: Split | Batch) -> Tensor:
        """Which modalities each item has, (n, M) bool; all of them where the site file does not say."""
        extras = items.extras if isinstance(items, Batch) else items.extras_at(items.index)
        if PRESENT in extras:
            return extras[PRESENT] > 0
        return torch.ones(len(items), len(self.data.channels), dtype=torch.bool, device=self.device)

    def _beta(self, extras: dict[str, Tensor]) -> Tensor:
        """β (M,) of the server or of the site; ones as long as there is none."""
        ones = torch.ones(len(self.data.channels), dtype=torch.float64)
        known = extras.get("beta") if self.params.beta == "shared" else self.personal.get(BETA)
        return known if known is not None and known.shape == ones.shape else ones

    def forward(self, batch: Batch) -> Output:
        """The fused pass; `aux` also holds the encoders' maps and what is present, for the students."""
        network, present = cast(MultiEncoder, self.model), self._presence(batch)
        if self.drops is not None and self.model.training:
            present = random_part(present, self.drops)
        with self.autocast():
            levels = network.encode(batch.images, present)
            logits, features, deep = network.decode(levels, present)
        return Output(logits.float(), features, {"deep": deep, "levels": levels, "present": present})

    def loss(self, output: Output, batch: Batch, step: int) -> dict[str, Tensor]:
        """The terms fuse and deep, and unless the mode is plain single, pixel and semantic, with their weights."""
        assert output.aux is not None
        present = output.aux["present"]
        truth = class_masks(batch.targets, output.logits.shape[1])
        fuse = weighted_ce_dice(output.logits.softmax(dim=1), truth)
        deep = deep_ce_dice([logits.float() for logits in output.aux["deep"]], truth)
        reduce = torch.mean if self.params.supervision == "mean" else torch.sum
        terms = {"fuse": reduce(fuse), "deep": reduce(deep)}
        self.num_seen += present.sum(dim=0)
        if self.params.mode == "plain":
            return terms
        losses = self._item_losses(output, truth)
        self.distance_sum += torch.where(present, losses.distance, 0.0).sum(dim=0)
        gate = balance.task_gate(balance.task_lag(losses.distance, present))
        added = balance.balanced_terms(*losses[:3], present, gate, self.beta, self.frequency)
        weight = {"single": 1.0, "pixel": self.params.pixel_weight, "semantic": self.params.semantic_weight}
        return {**terms, **{name: weight[name] * value for name, value in added.items()}}

    def _item_losses(self, output: Output, truth: Tensor) -> ItemLosses:
        """Losses and distance of every student; zeros for a modality that nobody at this site has."""
        assert output.aux is not None and output.features is not None
        size, features = truth.shape[2:], output.features.detach().float()
        with torch.no_grad():
            scales = (output.logits, *output.aux["deep"])
            teacher = [distillation.tempered(z.float(), self.params.temperature, size) for z in scales]
            maps = distillation.similarity_maps(features, truth)
        nothing = (truth.new_zeros(len(truth)),) * 4
        rows = [
            self._student(output.aux, m, truth, teacher, maps) if there else nothing
            for m, there in enumerate(self.at_site)
        ]
        return ItemLosses(*(torch.stack(column, dim=1) for column in zip(*rows, strict=True)))

    def _student(
        self, aux: dict[str, Any], modality: int, truth: Tensor, teacher: list[Tensor], teacher_maps: Tensor
    ) -> tuple[Tensor, ...]:
        """single, pixel, semantic and distance of one modality, each (B,): two decodings of the maps at hand."""
        network, classes = cast(MultiEncoder, self.model), distillation.own_classes(truth)
        with self.autocast():
            logits, features, deep = network.decode(aux["levels"], only(aux["present"], modality))
            alone = network.decode_single(aux["levels"], modality)
        maps = distillation.similarity_maps(features.float(), truth)
        scales = [z.float() for z in (logits, *deep)]
        return (
            weighted_ce_dice(alone.float().softmax(dim=1), truth),
            distillation.pixel_distillation(scales, teacher, self.params.temperature),
            distillation.semantic_loss(maps, teacher_maps, classes),
            distillation.semantic_distance(maps, teacher_maps, classes),
        )

    def end_round(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Send counts and, where β is shared, distances, if the server balances; or make the next β here."""
        self.drops = None
        if not len(self.train_set):
            return {}, {}
        sums, counts = (x.cpu() for x in site_distances(self.distance_sum, self.num_seen, self.counts))
        distils, local = self.params.mode == "passion", self.params.beta == "local"
        if distils and local:
            self._keep_balance(sums.double() / counts)  # 0 / 0: not measured
        measured = {"distance_sum": sums} if distils and not local else {}
        return ({"modality_count": counts, **measured} if self.asked else {}), {}

    def _keep_balance(self, distance: Tensor) -> None:
        """One update of the site's own β, from its distances (M,)."""
        rule, own = balance.BalanceParams(), self._beta({}).double()
        fresh = BETA not in self.personal
        eta = rule.eta if fresh else float(self.personal[ETA])
        updates = 0 if fresh else int(self.personal[UPDATES])
        beta, eta = balance.update_balance(own, eta, updates, distance, rule)
        more = int(bool(distance.isfinite().any()))
        kept = {BETA: beta, ETA: torch.tensor(eta, dtype=torch.float64), UPDATES: torch.tensor(updates + more)}
        self.personal = {**self.personal, **kept}
