"""FedLPPA at the site: pseudo-labels and gaps by hand, what each term moves, whose prompts move, what is merged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.merging import SITE_INDEX
from clients.prompted_decoders import (
    KIND,
    PromptedDecoders,
    PromptedDecodersParams,
    kind_index,
    pseudo_label_loss,
    pseudo_labels,
    rampup,
    softmax_gap,
    squared_gap,
    universal_term,
)
from fedmed.config import from_tree
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteData
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Env, Moment, make_optimizer
from fedmed.federation.layout import Layout
from fedmed.federation.scoring import score_view
from fedmed.federation.state import clone_state
from fedmed.losses.partial import partial_dice_loss
from fedmed.models import build_model
from fedmed.models.prompt_unet import AUX_LOGITS, PLANES

IGNORED = 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site_data(kind: str = "scribble", num_items: int = 8, labels: str = "both") -> SiteData:
    """Bright squares on noise; a line through each is annotated. labels: both classes, background, none, or all (full masks)."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 120, (num_items, 32, 32), dtype=np.uint8)
    mask = np.zeros((num_items, 32, 32), dtype=np.uint8)
    mask[:, 8:22, 10:24] = 1
    image[mask == 1] += 100
    target = np.full_like(mask, IGNORED)
    if labels in ("both", "background"):
        columns = slice(2, 30) if labels == "both" else slice(0, 9)
        target[:, 14:16, columns] = mask[:, 14:16, columns]
    items = [str(i) for i in range(num_items)]
    return SiteData(
        name="a", task="segmentation", classes=("background", "square"), channels=("gray",), image_size=(32, 32),
        label_kind=kind, image=image, target=mask if labels == "all" else target, item_id=items, group_id=items,
        splits={"train": np.arange(num_items, dtype=np.int32), "test": np.arange(2, dtype=np.int32)},
        eval_target=mask, ignore_value=None if labels == "all" else IGNORED,
    )  # fmt: skip


def site(
    round_number: int = 1,
    *,
    data: SiteData | None = None,
    index: int = 1,
    num_sites: int = 3,
    model: str = "prompt_unet",
    activation: str = "softmax",
    optimizer: dict[str, Any] | None = None,
    room: int = 4,
    **args: Any,
) -> Any:
    """A client that has received the initial model and begins the round."""
    tree = {"client": {"name": "fedlppa", "args": args}, "training": {"batch_size": 4}, "model": {"name": model}}
    config = from_tree({**tree, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, **(optimizer or {})}})
    extra = {"num_sites": room} if model == "prompt_unet" else {}
    network = build_model(model, {"base_width": 2, **extra}, 1, 2, (32, 32), "segmentation", seed=1)
    layout = Layout.of(network, PromptedDecoders.is_personal)
    env = Env(config, data or site_data(), network, layout, torch.device("cpu"), activation, "a")
    client = PromptedDecoders(env, Moment(round_number, 9, site_index=index, num_sites=num_sites), {})
    client.received = clone_state(layout.exchanged_state(network))
    return client


def begin(client: Any, personal: dict[str, Tensor] | None = None) -> Any:
    client.personal = dict(personal or {})
    client.load_view("personal")
    client.begin_round({}, {})
    return client


def step_with(client: Any, batch: Batch) -> dict[str, Tensor]:
    client.optimizer = make_optimizer(client.model, client.config, {}, client.lr)
    client.model.train()
    terms: dict[str, Tensor] = client.train_step(batch, 0)
    return terms


def first_batch(client: Any, size: int = 4) -> Batch:
    return next(iter(batches(client.train_set, size)))


# ---------------------------------------------------------------- equations


def test_pseudo_labels_by_hand() -> None:
    prob, aux = (torch.tensor(p, dtype=torch.float64).view(1, 2, 1, 1) for p in ((0.8, 0.2), (0.1, 0.9)))
    assert pseudo_labels(prob, aux, 0.3).flatten().tolist() == [1]  # (0.31, 0.69)
    assert pseudo_labels(prob, aux, 0.8).flatten().tolist() == [0]  # (0.66, 0.34)
    assert pseudo_labels(prob, aux, 0.0).item() == 1 and pseudo_labels(prob, aux, 1.0).item() == 0
    half = torch.full((1, 3, 1, 2), 1 / 3)
    assert pseudo_labels(half, half, 0.25).tolist() == [[[0, 0]]]  # equal: the lowest class


def test_pseudo_label_loss_by_hand() -> None:
    """Two pixels, ŷ = (0, 1), one decoder certain and right, the other undecided: Dice loss 1 - 2·0.5 / (0.5 + 1) by class."""
    right = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]], dtype=torch.float64)
    undecided = torch.full_like(right, 0.5)
    labels = torch.tensor([[[0, 1]]])
    assert float(pseudo_label_loss(right, right, labels, smooth=0.0)) == pytest.approx(0.0)
    assert float(pseudo_label_loss(right, undecided, labels, smooth=0.0)) == pytest.approx((1 - 2 * 0.5 / 1.5) / 2)
    assert torch.equal(pseudo_label_loss(right, undecided, labels), pseudo_label_loss(undecided, right, labels))
    one = partial_dice_loss(undecided, labels)
    torch.testing.assert_close(pseudo_label_loss(undecided, undecided, labels), one)
    nowhere = pseudo_label_loss(right, right, torch.zeros(1, 1, 2, dtype=torch.int64))  # a class without a pixel
    assert bool(nowhere.isfinite())


def test_gaps_by_hand() -> None:
    """One position, two channels: q_i = (1/2, 1/2), q_k = (3/4, 1/4)."""
    own = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    other = torch.tensor([math.log(3), 0.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert softmax_gap(own, other).tolist() == pytest.approx([divergence])
    assert squared_gap(own, other).tolist() == pytest.approx([math.log(3) ** 2 / 2])
    two = torch.cat([other, own[None]])
    assert softmax_gap(own, two).tolist() == pytest.approx([divergence, 0.0])
    assert float(universal_term(own, two)) == pytest.approx(-divergence / 2)
    assert float(universal_term(own, two, "mse", limit=0.1)) == pytest.approx(-0.05)
    assert float(universal_term(own, other[:0])) == 0.0


def test_gaps_are_finite_whatever_the_features() -> None:
    """Negative features, of which the official form takes logarithms, and large ones."""
    own, others = -drawn(2, 4, 3, 3).abs(), 1e4 * drawn(3, 2, 4, 3, 3, seed=1)
    for gap in ("softmax", "mse"):
        value = universal_term(own, others, gap)
        assert bool(value.isfinite()) and -5 <= float(value) <= 0
        assert float(universal_term(own, own.expand(3, *own.shape), gap)) == pytest.approx(0.0)
    assert torch.equal(softmax_gap(own, others)[[2, 0, 1]], softmax_gap(own, others[[2, 0, 1]]))


def test_gradients() -> None:
    own, others = drawn(2, 3, 2, 2).requires_grad_(), drawn(2, 2, 3, 2, 2, seed=1).requires_grad_()
    for gap in ("softmax", "mse"):
        assert torch.autograd.gradcheck(lambda x, g=gap: universal_term(x, others, g, 50.0), (own,))
    universal_term(own, others).backward()
    assert others.grad is None and float(own.grad.abs().max()) > 0
    prob, aux = (drawn(2, 3, 2, 2, seed=s).softmax(dim=1).requires_grad_() for s in (2, 3))
    labels = pseudo_labels(prob, aux, 0.4)
    assert torch.autograd.gradcheck(lambda p, q: pseudo_label_loss(p, q, labels), (prob, aux))


def test_kinds_and_rampup() -> None:
    assert [kind_index(name) for name in PLANES] == [0, 1, 2]
    assert [kind_index(n) for n in ("noisy_scribble", "box", "keypoint")] == [0, 1, 2]
    assert {kind_index(n) for n in ("mask", "image", "none", "", "contour")} == {-1}
    assert [rampup(r, 4) for r in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0] and rampup(1, 0) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": -1.0}, {"beta": math.inf}, {"uni": "kl"}, {"uni_limit": 0.0}, {"pls_rampup_rounds": -1}, {"eta": -1.0}],
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PromptedDecodersParams(**wrong)


# ---------------------------------------------------------------- the terms at a site


def test_terms_of_a_step() -> None:
    client = begin(site())
    terms = step_with(client, first_batch(client))
    assert set(terms) == {"pce", "uni", "pls"} and all(bool(v.isfinite()) for v in terms.values())
    assert float(terms["pce"]) > 0 and float(terms["uni"]) <= 0 and float(terms["pls"]) > 0
    assert -0.1 * 5 <= float(terms["uni"]) < 0


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    client = begin(site(alpha=0.0, beta=0.0))
    before = client.model.aux_decoder.out_conv.weight.detach().clone()
    assert set(step_with(client, first_batch(client))) == {"pce"}
    assert torch.equal(client.model.aux_decoder.out_conv.weight, before)  # it has no part in pce


def test_beta_rises() -> None:
    weights = [begin(site(r, pls_rampup_rounds=4)).beta for r in (1, 2, 8)]
    assert weights == pytest.approx([0.125, 0.25, 0.5])


def test_one_site_has_nobody_to_differ_from() -> None:
    for index, num_sites in ((0, 1), (-1, 3)):
        client = begin(site(index=index, num_sites=num_sites))
        assert float(step_with(client, first_batch(client))["uni"]) == 0.0


def test_the_term_ranges_over_the_sites_of_the_run() -> None:
    assert begin(site(index=1, num_sites=3)).others.tolist() == [0, 2]
    assert begin(site(index=0, num_sites=9, room=3)).others.tolist() == [1, 2]


def test_annotation_can_replace_pseudo_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(prob: Tensor, aux: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return pseudo_label_loss(prob, aux, labels)

    monkeypatch.setattr("clients.prompted_decoders.pseudo_label_loss", spy)
    for keep in (False, True):
        client = begin(site(keep_drawn=keep))
        batch = first_batch(client)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout
            step_with(client, batch)
    drawn_pixels = batch.targets != IGNORED
    assert torch.equal(seen[1][drawn_pixels], batch.targets[drawn_pixels])
    assert not torch.equal(seen[0][drawn_pixels], batch.targets[drawn_pixels])
    assert torch.equal(seen[0][~drawn_pixels], seen[1][~drawn_pixels])


def test_draws_are_the_sites_own() -> None:
    """m hangs on seed, round and site, not on a global generator."""
    draws = []
    for number in (1, 1, 2):
        client = begin(site(number))
        torch.rand(3)
        draws.append(torch.rand(4, generator=client.shares).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_the_model_is_told_site_and_kind() -> None:
    client = begin(site(data=site_data("box"), index=2))
    batch = first_batch(client)
    client.forward(batch)
    assert batch.extras[SITE_INDEX].tolist() == [2] * 4 and batch.extras[KIND].tolist() == [1] * 4
    assert batch.extras[KIND].dtype == torch.int64
    full = begin(site(data=site_data("mask", labels="all")))
    batch = first_batch(full)
    assert full.forward(batch).aux[AUX_LOGITS].shape == (4, 2, 32, 32) and set(batch.extras[KIND].tolist()) == {-1}


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "adam"}, {"name": "sgd", "momentum": 0.9}])
def test_only_the_own_prompt_moves(optimizer: dict[str, Any]) -> None:
    """Weight decay would shrink all rows; only that of the site may move, over several steps."""
    client = begin(site(index=1, optimizer={**optimizer, "weight_decay": 0.5}))
    client.fit()
    before, after = client.received["distribution_prompts"], client.model.distribution_prompts.detach()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(after[1], before[1])
    assert not torch.equal(client.model.universal_prompt, client.received["universal_prompt"])
    client.end_round()
    assert torch.equal(client.personal["distribution_prompts"], after)


def test_without_a_place_in_the_federation_all_rows_are_trained() -> None:
    client = begin(site(index=-1))
    client.fit()
    assert bool((client.model.distribution_prompts.detach() != client.received["distribution_prompts"]).all())


# ---------------------------------------------------------------- rounds


def test_main_decoder_is_merged_and_the_auxiliary_is_the_one_received() -> None:
    first = begin(site(1))
    first.fit()
    first.end_round()
    client = begin(site(7, merge_data_share=1.0, ala_init="zeros", eta=0.0), first.personal)
    state = client.model.state_dict()
    for name, value in client.layout.entries.items():
        upper = name.split(".")[0] in ("decoder", "mlp") and value.kind == "parameter"
        expected = first.personal[name] if upper else client.received[name]
        assert torch.equal(state[name], expected), name
    changed = [
        n for n in state if n.startswith(("aux_decoder.", "mlp.")) and not torch.equal(state[n], first.personal[n])
    ]
    assert any(name.startswith("aux_decoder.") for name in changed)
    client.fit()
    arrays, metrics = client.end_round()
    client.check_leaves(arrays, metrics)
    assert arrays == {} and metrics == {"merge_weight_mean": 0.0}
    kept = {name for name in client.personal if name.startswith("merge/") and "." in name}
    assert kept and not any("aux_decoder" in name for name in kept)


def test_views() -> None:
    """The personal view is the site's own model, and neither view needs the auxiliary decoder."""
    client = begin(site())
    client.fit()
    client.end_round()
    scores = {view: score_view(client, view)[0][f"test/{view}/dice"] for view in client.views}
    assert set(scores) == {"global", "personal"} and all(math.isfinite(v) for v in scores.values())
    client.load_view("personal")
    assert torch.equal(
        client.model.state_dict()["encoder.stages.0.0.weight"], client.personal["encoder.stages.0.0.weight"]
    )


@pytest.mark.parametrize("labels", ["background", "all"])
def test_other_annotation(labels: str) -> None:
    client = begin(site(data=site_data("mask" if labels == "all" else "scribble", labels=labels)))
    found = client.fit()
    assert math.isfinite(found["train_loss"]) and found["loss/pce"] > 0


def test_no_annotation_at_all() -> None:
    client = begin(site(data=site_data("none", labels="none")))
    assert len(client.train_set) == 0 and client.end_round() == ({}, {}) and client.personal == {}


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"not unet; set model\.name=prompt_unet"):
        begin(site(model="unet"))
    with pytest.raises(UserError, match=r"set model\.activation=softmax"):
        begin(site(activation="sigmoid"))
    client = begin(site(index=4))
    with pytest.raises(UserError, match=r"raise model\.args\.num_sites"):
        client.fit()
