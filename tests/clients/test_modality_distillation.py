"""PASSION at the site: what is counted, which terms a step has, what is sent and what a missing modality may do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.modality_distillation import (
    BETA,
    ETA,
    UPDATES,
    ModalityDistillation,
    ModalityDistillationParams,
    random_part,
    site_distances,
)
from fedmed.config import from_tree
from fedmed.data.loader import batches
from fedmed.data.phantom import make_phantom
from fedmed.data.site_file import SiteFile
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.site import make_addons
from fedmed.federation.state import clone_state
from fedmed.losses import balance
from fedmed.losses.weighted_segmentation import class_masks, deep_ce_dice, weighted_ce_dice
from fedmed.models.build import build_model

Make = Callable[..., Any]
SHARED = {"beta": torch.ones(3)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modalities")
    return make_phantom(folder / "m.h5", "multimodal", num_sites=1, images_per_site=12, image_size=16)


@pytest.fixture
def make(path: Path) -> Make:
    """`make(present=..., extras=..., activation=..., **client)`: a client whose training items have these modalities."""

    def new(present: Any = None, extras: Any = SHARED, activation: str = "softmax", **args: Any) -> Any:
        training = args.pop("training", {})
        tree = {"client": {"args": args}, "training": {"batch_size": 3, **training}, "optimizer": {"name": "adamw"}}
        config = from_tree(tree)
        with SiteFile.open(path) as file:
            data = file.site(file.sites[0].name)
        model = build_model("multi_encoder_unet", {"base_width": 2, "depth": 2}, 3, 2, (16, 16), "segmentation", seed=1)
        layout = Layout.of(model, ModalityDistillation.is_personal)
        env = Env(config, data, model, layout, torch.device("cpu"), activation, data.name)
        client = ModalityDistillation(env, Moment(1, 4), make_addons(config))
        client.received = clone_state(layout.exchanged_state(model))
        rows = client.train_set.index
        if present is not None:
            known = torch.zeros(int(rows.max()) + 1, 3, dtype=torch.uint8)
            known[rows] = torch.tensor(present, dtype=torch.uint8).expand(len(rows), 3)
            extras_of = {**client.train_set._store.extras, "modality_present": known}
            client.train_set._store = dataclasses.replace(client.train_set._store, extras=extras_of)
        if extras is not None:
            client.begin_round({}, extras)
        return client

    return new


def mixed(count: int = 8) -> list[list[int]]:
    return [[[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]][i % 4] for i in range(count)]


def batch_of(client: Any, *positions: int) -> Batch:
    batch: Batch = client.train_set.batch(torch.tensor(positions))
    return batch


def test_site_distances_by_hand() -> None:
    """Two epochs over 4 items having modality 0; modality 1 was not met; nobody has modality 2."""
    sums, counts = site_distances(torch.tensor([1.6, 0.0, 0.0]), torch.tensor([8.0, 0.0, 0.0]), torch.tensor([4, 2, 0]))
    assert sums.tolist() == pytest.approx([0.8, 0.0, 0.0]) and counts.tolist() == [4, 0, 0]
    assert sums.dtype == torch.float32 and counts.dtype == torch.int64


def test_random_parts_are_non_empty_available_and_equally_likely() -> None:
    present = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool().repeat_interleave(7000, dim=0)
    kept = random_part(present, torch.Generator().manual_seed(0))
    assert not (kept & ~present).any()
    assert kept[:14000].any(dim=1).all() and not kept[14000:].any()
    codes = (kept[:7000].long() * torch.tensor([1, 0, 2, 4])).sum(dim=1)
    counts = torch.bincount(codes, minlength=8)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 130


def test_counts_frequency_and_images_without_modality(make: Make) -> None:
    """Of the 8 training items one has nothing at all: it is left out of training and of the number of examples."""
    present = mixed()
    present[5] = [0, 0, 0]
    client = make(present)
    assert len(client.train_set) == 7 and client.counts.tolist() == [5, 6, 3]
    # 7 items in batches of 3 make 2 steps: a last batch of one item is skipped.
    torch.testing.assert_close(client.frequency, torch.tensor([2 / 5, 2 / 6, 2 / 3]))
    empty = make([[0, 0, 0]])
    assert len(empty.train_set) == 0 and empty.end_round() == ({}, {})
    assert empty.frequency.tolist() == [0, 0, 0]


def test_a_file_that_does_not_say_has_all_modalities(make: Make) -> None:
    client = make(extras=None)
    store = client.train_set._store
    client.train_set._store = dataclasses.replace(store, extras={})
    client.begin_round({}, SHARED)
    assert client.counts.tolist() == [8, 8, 8] and client.forward(batch_of(client, 0, 1)).aux["present"].all()


def test_terms_of_a_step_agree_with_their_parts(make: Make) -> None:
    client = make(mixed())
    client.beta = torch.tensor([0.5, 1.0, 1.5])
    batch = batch_of(client, 0, 1, 3)
    output = client.forward(batch)
    terms = client.loss(output, batch, 0)
    truth = class_masks(batch.targets, 2)
    torch.testing.assert_close(terms["fuse"], weighted_ce_dice(output.logits.softmax(dim=1), truth).mean())
    torch.testing.assert_close(terms["deep"], deep_ce_dice(output.aux["deep"], truth).mean())
    with torch.no_grad():
        losses = client._item_losses(output, truth)
    present = batch.extras["modality_present"]
    gate = balance.task_gate(balance.task_lag(losses.distance, present))
    assert 0 < float(gate.sum()) < 3
    v, c = client.frequency, present.float()
    terms = {name: value.detach() for name, value in terms.items()}
    assert float(terms["single"]) == pytest.approx(float((c * losses.single * gate * client.beta * v).sum()), rel=1e-5)
    assert float(terms["pixel"]) == pytest.approx(0.5 * float((c * losses.pixel * client.beta * v).sum()), rel=1e-5)
    assert float(terms["semantic"]) == pytest.approx(0.1 * float((c * losses.semantic * gate * v).sum()), rel=1e-5)
    torch.testing.assert_close(client.distance_sum, (c * losses.distance).sum(dim=0))
    assert client.num_seen.tolist() == [3, 2, 2]


def test_supervision_as_a_sum(make: Make) -> None:
    mean, total = make(mixed()), make(mixed(), supervision="sum")
    batch = batch_of(mean, 0, 1, 3)
    first, second = (c.loss(c.forward(batch), batch, 0) for c in (mean, total))
    for name in ("fuse", "deep"):
        torch.testing.assert_close(second[name], 3 * first[name])
    torch.testing.assert_close(second["pixel"], first["pixel"])


def test_students_of_a_single_modality_are_the_teacher(make: Make) -> None:
    """Pixel and prototype terms are 0, all gates are closed, gradients are finite."""
    client = make([[0, 1, 0]])
    batch = batch_of(client, 0, 1)
    terms = client.loss(client.forward(batch), batch, 0)
    assert not terms["single"].any() and not terms["semantic"].any()
    assert terms["pixel"].tolist() == pytest.approx(0.0, abs=1e-6) and client.distance_sum[1] < 1e-6
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in client.model.parameters())


def test_the_teacher_gets_no_gradient_from_the_students(make: Make) -> None:
    """Only L_fuse and L_prm pull on the fused pass: cut off there, the other terms have the same gradients."""
    gradients: list[dict[str, Tensor]] = []
    for cut in (False, True):
        client = make(mixed())
        batch = batch_of(client, 0, 3)
        output = client.forward(batch)
        if cut:
            aux = {**output.aux, "deep": [z.detach() for z in output.aux["deep"]]}
            output = type(output)(output.logits.detach(), output.features.detach(), aux)
        terms = client.loss(output, batch, 0)
        (terms["single"] + terms["pixel"] + terms["semantic"]).backward()
        gradients.append({n: p.grad.clone() for n, p in client.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 5
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("present", [[[1, 1, 1]], [[1, 0, 0]], None])
def test_training_stays_finite(make: Make, present: Any) -> None:
    client = make(mixed() if present is None else present, drop="random")
    means = client.fit()
    assert set(means) == {"train_loss", *(f"loss/{k}" for k in ("fuse", "deep", "single", "pixel", "semantic"))}
    assert all(np.isfinite(value) for value in means.values())
    assert all(bool(p.isfinite().all()) for p in client.model.parameters())


def test_what_is_sent(make: Make) -> None:
    """Sums over one pass: two epochs in eval-like conditions give the mean of both; counts are those of the items."""
    client = make(mixed(), training={"batch_size": 4, "epochs": 2})
    client.fit()
    assert client.num_seen.tolist() == [12, 12, 8]
    arrays, metrics = client.end_round()
    assert metrics == {} and arrays["modality_count"].tolist() == [6, 6, 4]
    torch.testing.assert_close(arrays["distance_sum"], client.distance_sum / 2)
    client.check_leaves(arrays, metrics)
    assert arrays["distance_sum"].shape == (3,) and client.personal == {}


def test_a_modality_that_was_never_met_counts_nothing(make: Make) -> None:
    """One step only, whose items lack modality 2: its encoder has learnt nothing in this round."""
    client = make([[1, 1, 0]] * 7 + [[0, 0, 1]])
    batch = batch_of(client, 0, 1, 2)
    client.loss(client.forward(batch), batch, 0)
    assert client.end_round()[0]["modality_count"].tolist() == [7, 7, 0]


def test_a_modality_nobody_has_costs_nothing(make: Make) -> None:
    client = make([[1, 1, 0]])
    output = client.forward(batch_of(client, 0, 1))
    losses = client._item_losses(output, class_masks(batch_of(client, 0, 1).targets, 2))
    assert all(not column[:, 2].any() for column in losses) and client.frequency[2] == 0


def test_nothing_is_sent_to_a_server_that_does_not_balance(make: Make) -> None:
    for args in ({}, {"mode": "plain"}, {"beta": "local"}):
        client = make(mixed(), extras={}, **args)
        client.fit()
        assert client.end_round() == ({}, {})


def test_plain_mode_has_the_base_losses_alone(make: Make) -> None:
    plain, full = make(mixed(), mode="plain"), make(mixed())
    batch = batch_of(plain, 0, 1)
    terms, more = (c.loss(c.forward(batch), batch, 0) for c in (plain, full))
    assert set(terms) == {"fuse", "deep"} and all(torch.equal(terms[k], more[k]) for k in terms)
    assert plain.end_round()[0].keys() == {"modality_count"}


def test_beta_of_the_server_weighs(make: Make) -> None:
    one, two = make(mixed()), make(mixed(), extras={"beta": torch.full((3,), 2.0)})
    batch = batch_of(one, 0, 1, 3)
    first, second = (c.loss(c.forward(batch), batch, 0) for c in (one, two))
    torch.testing.assert_close(second["pixel"], 2 * first["pixel"])
    torch.testing.assert_close(second["semantic"], first["semantic"])


def test_a_beta_of_its_own(make: Make) -> None:
    client = make(mixed(), beta="local")
    client.fit()
    assert client.end_round()[0].keys() == {"modality_count"}
    kept = client.personal
    assert int(kept[UPDATES]) == 1 and float(kept[ETA]) == pytest.approx(0.015)
    expected, _ = balance.update_balance(
        torch.ones(3, dtype=torch.float64),
        0.01,
        0,
        (client.distance_sum / client.num_seen).double(),
        balance.BalanceParams(),
    )
    torch.testing.assert_close(kept[BETA], expected, rtol=1e-6, atol=0)
    following = make(mixed(), extras=None, beta="local")
    following.personal = dict(kept)
    following.begin_round({}, {"beta": torch.full((3,), 9.0)})
    torch.testing.assert_close(following.beta, kept[BETA].float())
    following.fit()
    following.end_round()
    assert int(following.personal[UPDATES]) == 2 and float(following.personal[ETA]) == pytest.approx(0.015)
    assert torch.equal(kept[BETA], expected.new_tensor(kept[BETA].tolist()))  # replaced, not written into


def test_a_beta_of_its_own_without_a_step(make: Make) -> None:
    client = make(mixed(), beta="local")
    client.end_round()
    assert client.personal[BETA].tolist() == [1, 1, 1] and int(client.personal[UPDATES]) == 0


def test_dropping_is_for_training_only(make: Make) -> None:
    client = make([[1, 1, 1]], drop="random")
    batch = batch_of(client, *range(8))
    client.model.train()
    parts = torch.cat([client.forward(batch).aux["present"] for _ in range(4)])
    assert parts.any(dim=1).all() and not parts.all()
    client.model.eval()
    assert client.forward(batch).aux["present"].all()


def test_prediction_uses_what_an_image_has(make: Make) -> None:
    client = make(mixed())
    batch = batch_of(client, 1)  # lacks modality 1
    client.model.eval()
    prob = client.predict(batch, "global")
    assert prob.shape == (1, 2, 16, 16)
    batch.images[:, 1] = 7.0
    torch.testing.assert_close(client.predict(batch, "global"), prob)
    batch.images[:, 0] = 7.0
    assert not torch.allclose(client.predict(batch, "global"), prob)


def test_three_classes(make: Make) -> None:
    client = make(mixed())
    client.model = build_model("multi_encoder_unet", {"base_width": 2, "depth": 3}, 3, 3, (16, 16), "segmentation")
    batch = next(batches(client.train_set, 4))
    batch.targets[:, :4] = 2
    terms = client.loss(client.forward(batch), batch, 0)
    assert all(bool(value.isfinite()) for value in terms.values())


def test_what_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"set model\.activation=softmax"):
        make(activation="sigmoid")
    client = make(extras=None)
    client.model = torch.nn.Identity()
    with pytest.raises(UserError, match=r"set model\.name=multi_encoder_unet"):
        client.begin_round({}, SHARED)


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "x"}, {"drop": "x"}, {"beta": "x"}, {"supervision": "x"}, {"temperature": 0}, {"pixel_weight": -1}],
)
def test_parameters_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mode passion or plain"):
        ModalityDistillationParams(**wrong)
