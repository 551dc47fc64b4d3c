"""Add-on `npr`: what it keeps, what it reads, that it pulls features together, and what it refuses."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.personal_head import PersonalHead
from clients.prototype_regulariser import (
    PROTOTYPES,
    VALID,
    PrototypeRegulariser,
    PrototypeRegulariserParams,
    initial_prototypes,
    pooled,
)
from clients.supervised import Supervised
from fedmed.errors import UserError
from fedmed.federation.seeding import torch_rng
from fedmed.federation.state import clone_state
from fedmed.losses.prototypes import npr_loss, refresh_prototypes, sinkhorn_plan
from fedmed.models.output import Output


def riding(new_client: Any, cls: type = Supervised, task: str = "classification", **args: Any) -> tuple[Any, Any]:
    """A client that has begun a round, and its add-on."""
    client = new_client(cls, task, addons={"npr": {"enabled": True, **args}})
    begin(client)
    return client, client.addons["npr"]


def begin(client: Any) -> None:
    client.load_view("personal")
    client.begin_round({}, {})
    for addon in client.addons.values():
        addon.begin_round(client, {}, {})


def features_of(client: Any) -> tuple[Tensor, Tensor]:
    pairs = [(output.features, batch.targets) for batch, output in client.sweep("train")]
    return torch.cat([f for f, _ in pairs]), torch.cat([t for _, t in pairs])


def test_prototypes_are_those_of_the_received_model(new_client: Any) -> None:
    """Written out: the site's generator, one sweep, per class a plan, the first best sub-cluster and its mean direction."""
    client, addon = riding(new_client, num_prototypes=3)
    features, labels = features_of(client)
    start = initial_prototypes(len(client.data.classes), 3, features.shape[1], torch_rng(0, 1, client.site, "npr"))
    expected, new = refresh_prototypes(features, labels, start, lambda s: sinkhorn_plan(s, 0.05, 3).argmax(dim=1))
    kept = client.personal
    assert set(kept) == {PROTOTYPES, VALID} and torch.equal(kept[PROTOTYPES], expected)
    assert torch.equal(addon.prototypes, expected) and expected.dtype == torch.float32
    assert kept[VALID].tolist() == new.tolist() == (torch.bincount(labels, minlength=len(new)) > 1).tolist()
    moved = expected.norm(dim=-1)[(expected != start).any(dim=-1)]
    torch.testing.assert_close(moved, torch.ones_like(moved))


def test_start_is_small_and_repeatable() -> None:
    first, again = (initial_prototypes(5, 4, 64, torch_rng(1, 1, "a", "npr")) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (5, 4, 64) and first.dtype == torch.float32
    assert float(first.std()) == pytest.approx(0.02, rel=0.1) and abs(float(first.mean())) < 0.002


def test_the_next_round_goes_on_from_what_was_kept(new_client: Any) -> None:
    client, _ = riding(new_client)
    before = clone_state(client.personal)
    begin(client)
    features, labels = features_of(client)
    expected, _ = refresh_prototypes(features, labels, before[PROTOTYPES], lambda s: sinkhorn_plan(s).argmax(dim=1))
    assert torch.equal(client.personal[PROTOTYPES], expected)


def test_what_was_kept_is_replaced_and_not_written_to(new_client: Any) -> None:
    client, _ = riding(new_client)
    kept = client.personal
    before = clone_state(kept)
    begin(client)
    assert client.personal is not kept and all(torch.equal(kept[k], before[k]) for k in before)


def test_prototypes_of_another_shape_are_made_anew(new_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = new_client(Supervised, addons={"npr": {"enabled": True}})
    client.personal = {PROTOTYPES: torch.zeros(2, 2, 2), VALID: torch.ones(2, dtype=torch.bool)}
    with caplog.at_level(logging.WARNING, logger="fedmed.site"):
        begin(client)
    assert "new ones" in caplog.text and client.personal[PROTOTYPES].shape[:2] == (len(client.data.classes), 4)


def test_the_sweep_leaves_the_model_alone(new_client: Any) -> None:
    client = new_client(Supervised, addons={"npr": {"enabled": True}})
    client.load_view("personal")
    before, mode = clone_state(client.model.state_dict()), client.model.training
    begin(client)
    after = client.model.state_dict()
    assert client.model.training == mode and all(torch.equal(after[k], before[k]) for k in before)


def test_the_term_rides_on_the_one_forward_pass(new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, addon = riding(new_client, lam=0.5)
    client.model.eval()
    batch, _ = next(client.sweep("train"))
    passes: list[int] = []
    forward = client.forward
    monkeypatch.setattr(client, "forward", lambda batch: passes.append(1) or forward(batch))
    terms = client.loss_terms(batch, 0)
    assert list(terms) == ["ce", "npr"] and passes == [1]
    term = terms["npr"]
    torch.testing.assert_close(
        term, 0.5 * npr_loss(forward(batch).features, addon.prototypes, batch.targets), rtol=1e-6, atol=1e-7
    )
    gradients = torch.autograd.grad(term, list(client.model.parameters()), allow_unused=True)
    names = [name for name, _ in client.model.named_parameters()]
    used = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert used == {name for name in names if not name.startswith("head")}  # the extractor only


def test_no_strength_changes_nothing_in_training(new_client: Any) -> None:
    plain = new_client(Supervised)
    begin(plain)
    plain.fit()
    free, _ = riding(new_client, lam=0.0)
    free.fit()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, free.model.state_dict()[name]), name


def test_training_with_it_lowers_its_loss(new_client: Any) -> None:
    def after(lam: float) -> float:
        client, addon = riding(new_client, lam=lam)
        for _ in range(8):
            client.fit()
        features, labels = features_of(client)
        return float(npr_loss(features, addon.prototypes, labels))

    assert after(5.0) < after(0.0)


def test_random_assignment_is_drawn_from_the_sites_generator(new_client: Any) -> None:
    client, _ = riding(new_client, assignment="random")
    again, _ = riding(new_client, assignment="random")
    balanced, _ = riding(new_client)
    assert torch.equal(client.personal[PROTOTYPES], again.personal[PROTOTYPES])
    assert not torch.equal(client.personal[PROTOTYPES], balanced.personal[PROTOTYPES])
    assert bool(client.personal[PROTOTYPES].isfinite().all())


def test_random_assignment_is_uniform() -> None:
    addon = PrototypeRegulariser(PrototypeRegulariserParams(True, assignment="random"))
    addon.rng = torch.Generator().manual_seed(0)
    drawn = torch.bincount(addon._assign(torch.eye(4000, 4)), minlength=4)
    assert drawn.sum() == 4000 and all(900 < int(n) < 1100 for n in drawn)


def test_only_valid_classes(new_client: Any) -> None:
    client, addon = riding(new_client, valid_classes_only=True)
    assert addon.classes.tolist() == client.personal[VALID].nonzero().flatten().tolist()
    _, all_of_them = riding(new_client)
    assert all_of_them.classes is None
    # a class stays valid: its prototypes are kept in rounds in which none of them moves
    client.personal = {**client.personal, VALID: torch.ones(len(client.data.classes), dtype=torch.bool)}
    begin(client)
    assert client.personal[VALID].all()


def test_nothing_to_train_on(new_client: Any) -> None:
    client = new_client(Supervised, addons={"npr": {"enabled": True}})
    client.load_view("personal")
    client.train_set = client.train_set.subset(torch.zeros(len(client.train_set), dtype=torch.bool))
    client.addons["npr"].begin_round(client, {}, {})
    assert client.personal == {}


def test_features_are_pooled_over_space() -> None:
    assert torch.equal(pooled(torch.arange(8.0).view(1, 2, 2, 2)), torch.tensor([[1.5, 5.5]]))
    assert pooled(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert pooled(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_rides_on_a_personal_classifier(new_client: Any) -> None:
    client, _ = riding(new_client, PersonalHead)
    assert set(client.fit()) >= {"train_loss", "loss/npr"}


def test_another_task_is_refused(new_client: Any) -> None:
    with pytest.raises(UserError, match="one class per image, the task here is segmentation"):
        riding(new_client, task="segmentation")


def test_a_model_without_features_is_refused(new_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new_client(Supervised, addons={"npr": {"enabled": True}})
    monkeypatch.setattr(client, "forward", lambda batch: Output(client.model(batch.images).logits))
    with pytest.raises(UserError, match="which model 'small_cnn' does not give"):
        begin(client)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lam": -0.1}, {"lam": math.inf}, {"lam": math.nan}, {"num_prototypes": 0}, {"assignment": "best"},
        {"sinkhorn_epsilon": 0.0}, {"sinkhorn_epsilon": math.nan}, {"sinkhorn_iterations": 0},
    ],
)  # fmt: skip
def test_constants_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PrototypeRegulariserParams(True, **wrong)
