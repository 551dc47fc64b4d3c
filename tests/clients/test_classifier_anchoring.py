"""FCA at the site: the three terms, who gets gradient from which, the two views, and sites with few classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.classifier_anchoring import (
    PRIOR_EPS,
    ClassifierAnchoring,
    ClassifierAnchoringParams,
    fca_terms,
    head_loss,
    personal_logits,
)
from clients.supervised import Supervised
from fedmed.config import from_tree
from fedmed.data.loader import batches
from fedmed.data.site_file import SiteFile
from fedmed.data.split import Batch
from fedmed.errors import UserError
from fedmed.federation.client import Client, Env, Moment
from fedmed.federation.layout import Layout
from fedmed.federation.scoring import score_view
from fedmed.federation.state import State, clone_state
from fedmed.losses.classification import log_prior
from fedmed.models.build import build_model
from fedmed.models.output import Output

F64 = torch.float64
HEAD = ("personal_head.weight", "personal_head.bias")
Make = Callable[..., Any]


@pytest.fixture
def anchored(site_files: dict[str, Path]) -> Make:
    """`anchored(args, personal, **config)`: a client on a small two-headed model that has received the initial one."""

    def make(args: dict[str, Any] | None = None, personal: State | None = None, **config: Any) -> Client:
        cls = config.pop("cls", ClassifierAnchoring)
        tree = {"client": {"args": args or {}}, "training": {"batch_size": 4}, "optimizer": {"name": "sgd", "lr": 0.1}}
        settings = from_tree({**tree, **config})
        with SiteFile.open(site_files["classification"]) as file:
            data = file.site(file.sites[0].name)
        shape = (len(data.channels), len(data.classes), data.image_size)
        model = build_model("two_heads", {"args": {"widths": [4, 4]}}, *shape, data.task, seed=1)
        layout = Layout.of(model, cls.is_personal)
        initial = clone_state({name: model.state_dict()[name] for name in layout.personal})
        env = Env(settings, data, model, layout, torch.device("cpu"), "softmax", data.name, initial)
        made: Client = cls(env, Moment(1, 4), {})
        made.received = clone_state(layout.exchanged_state(model))
        made.personal = personal or {}
        made.load_view("personal")
        return made

    return make


def first_batch(client: Client) -> Batch:
    return next(iter(batches(client.train_set, 4)))


def shares(*counts: float) -> Tensor:
    return log_prior(torch.tensor(counts, dtype=F64), PRIOR_EPS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def params(**values: Any) -> ClassifierAnchoringParams:
    return ClassifierAnchoringParams(**values)


# ---------------------------------------------------------------------- equations


def test_balanced_softmax_by_hand() -> None:
    loss = head_loss(torch.zeros(1, 2, dtype=F64), torch.tensor([1]), shares(90, 10), params())
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


def test_the_sum_is_weighted_as_asked() -> None:
    """1 + 3·2 + 0.1 = 7.1, with logits that make L1 = 1 and L2 = 2."""
    odds = [[math.log(math.e - 1), 0.0], [math.log(math.e**2 - 1), 0.0]]  # loss of label 1: ln(1 + e^x)
    first, second = (torch.tensor([row], dtype=F64) for row in odds)
    settings, labels = params(loss="ce"), torch.tensor([1])
    terms = fca_terms(first, second, labels, shares(1, 1), settings)
    assert float(terms["fed"]) == pytest.approx(1.0) and float(terms["per"]) == pytest.approx(6.0)
    scaled = fca_terms(first, second, labels, shares(1, 1), params(loss="ce", lambda_con=0.1 / float(terms["con"])))
    assert float(sum(scaled.values())) == pytest.approx(7.1)


def test_zero_weights_leave_nothing() -> None:
    settings = params(lambda_fed=0.0, lambda_per=0.0, lambda_con=0.0)
    terms = fca_terms(drawn(4, 3), drawn(4, 3, seed=1), torch.tensor([0, 1, 2, 0]), shares(5, 3, 2), settings)
    assert list(terms) == ["fed", "per", "con"] and all(value.item() == 0 for value in terms.values())


@pytest.mark.parametrize("loss", ["bsm", "ce", "focal"])
@pytest.mark.parametrize("consistency", ["kl", "released"])
def test_gradients_of_the_sum(loss: str, consistency: str) -> None:
    """To z1 exactly; to z2 as if there were no consistency."""
    first, second = drawn(5, 3).requires_grad_(), drawn(5, 3, seed=1).requires_grad_()
    labels, log_shares = torch.tensor([0, 2, 2, 0, 2]), shares(6, 0, 4)
    settings = params(loss=loss, consistency=consistency, lambda_con=0.7)

    def total(z1: Tensor, z2: Tensor, chosen: ClassifierAnchoringParams = settings) -> Tensor:
        return torch.stack(list(fca_terms(z1, z2, labels, log_shares, chosen).values())).sum()

    assert torch.autograd.gradcheck(lambda z: total(z, second), (first,))
    without = params(loss=loss, lambda_con=0.0)
    (with_it,) = torch.autograd.grad(total(first, second), second)
    (alone,) = torch.autograd.grad(total(first, second, without), second)
    torch.testing.assert_close(with_it, alone, rtol=0, atol=0)


def test_the_consistency_reaches_the_features_through_the_federated_head_only() -> None:
    features = drawn(4, 6).requires_grad_()
    w1, w2 = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()
    labels, settings = torch.tensor([0, 1, 2, 0]), params(lambda_fed=0.0, lambda_per=0.0)

    def con(anchor: Tensor) -> Tensor:
        return fca_terms(w1(features), anchor, labels, shares(2, 1, 1), settings)["con"]

    con(w2(features)).backward()
    assert w2.weight.grad is None and w2.bias.grad is None and w1.weight.grad is not None
    (whole,) = (features.grad,)
    (cut,) = torch.autograd.grad(con(w2(features.detach())), features)
    assert whole is not None
    torch.testing.assert_close(whole, cut, rtol=0, atol=0)


def test_an_absent_class() -> None:
    """Its logit is lowered by 20.7 in both losses, and stays finite even for a label nobody counted."""
    assert shares(6, 0, 4)[1].item() == pytest.approx(math.log(1e-9))
    logits = drawn(3, 3).requires_grad_()
    loss = head_loss(logits, torch.tensor([0, 1, 2]), shares(6, 0, 4), params())
    loss.backward()
    assert torch.isfinite(loss) and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_a_single_class() -> None:
    """Nothing to tell apart: both losses and their gradients are almost 0."""
    first = drawn(4, 3).requires_grad_()
    terms = fca_terms(first, drawn(4, 3, seed=1), torch.zeros(4, dtype=torch.int64), shares(4, 0, 0), params())
    assert terms["fed"].item() < 1e-6 and terms["per"].item() < 1e-6 and terms["con"].item() > 0
    (gradient,) = torch.autograd.grad(terms["fed"], first)
    assert gradient.abs().max() < 1e-6


def test_no_counts_at_all_is_the_plain_loss() -> None:
    logits, labels = drawn(4, 3), torch.tensor([0, 1, 2, 0])
    balanced = head_loss(logits, labels, shares(0, 0, 0), params())
    torch.testing.assert_close(balanced, head_loss(logits, labels, shares(0, 0, 0), params(loss="ce")))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lambda_fed": -1.0}, "finite lambda_fed >= 0 expected, got -1"),
        ({"lambda_per": math.inf}, "lambda_per"),
        ({"lambda_con": math.nan}, "lambda_con"),
        ({"gamma": -0.5}, "gamma"),
        ({"loss": "bce"}, "loss: one of bsm, ce, focal expected, got 'bce'"),
        ({"consistency": "js"}, "one of kl, released expected"),
    ],
)
def test_params_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        params(**values)


# ---------------------------------------------------------------------- the client


def test_only_the_second_head_is_personal(anchored: Make) -> None:
    client = anchored()
    assert client.layout.personal == HEAD and not set(HEAD) & set(client.layout.exchanged)
    assert ClassifierAnchoring.views == ("global", "personal") and ClassifierAnchoring.leaves == ()


def test_terms_of_a_batch(anchored: Make) -> None:
    client = anchored({"lambda_con": 2.0})
    client.begin_round({}, {})
    batch = first_batch(client)
    output = client.forward(batch)
    terms = client.loss(output, batch, 0)
    log_shares = log_prior(torch.as_tensor(np.asarray(client.class_counts)), PRIOR_EPS)
    expected = fca_terms(output.logits, personal_logits(output), batch.targets, log_shares, client.params)
    assert list(terms) == ["fed", "per", "con"]
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    plain = anchored({"lambda_con": 1.0})
    plain.begin_round({}, {})
    assert 2 * plain.loss(output, batch, 0)["con"].item() == pytest.approx(terms["con"].item())


def test_both_heads_learn_and_the_losses_are_named(anchored: Make) -> None:
    client = anchored(training={"batch_size": 4, "epochs": 8})
    before = clone_state(client.model.state_dict())
    client.begin_round({}, {})
    losses = client.fit()
    assert set(losses) == {"train_loss", "loss/fed", "loss/per", "loss/con"}
    after = client.model.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in (*HEAD, "base.head.weight"))
    client.begin_round({}, {})
    assert client.fit()["train_loss"] < losses["train_loss"]


def test_without_the_personal_weights_it_is_supervised_training(anchored: Make) -> None:
    """λ_per = λ_con = 0 with the plain loss: what everybody shares is that of the plain client."""
    client = anchored({"lambda_per": 0.0, "lambda_con": 0.0, "loss": "ce"})
    plain = anchored({"loss": "ce"}, cls=Supervised)
    for one in (client, plain):
        one.begin_round({}, {})
        one.fit()
    first, second = client.model.state_dict(), plain.model.state_dict()
    torch.testing.assert_close({n: first[n] for n in client.layout.exchanged},
                               {n: second[n] for n in client.layout.exchanged}, rtol=0, atol=0)  # fmt: skip


def test_views_and_their_heads(anchored: Make) -> None:
    kept = {name: torch.full_like(value, 0.5) for name, value in anchored().model.state_dict().items() if name in HEAD}
    client = anchored(personal=kept)
    batch = first_batch(client)
    client.model.eval()
    with torch.no_grad():
        output = client.forward(batch)
        own, common = client.predict(batch, "personal"), client.predict(batch, "global")
    assert torch.equal(common, output.logits.softmax(1)) and torch.equal(own, personal_logits(output).softmax(1))
    assert torch.allclose(own, torch.full_like(own, 1 / own.shape[1]))  # equal rows in the head that was kept
    client.load_view("global")
    assert not torch.equal(client.model.state_dict()[HEAD[0]], kept[HEAD[0]])
    client.load_view("personal")
    assert torch.equal(client.model.state_dict()[HEAD[0]], kept[HEAD[0]])


def test_a_model_with_one_head_is_refused(new_client: Make) -> None:
    client = new_client(ClassifierAnchoring)
    with pytest.raises(UserError, match=r"'small_cnn' has one; set model\.name=two_heads"):
        client.begin_round({}, {})


def test_a_site_of_one_class_is_named_once(anchored: Make, caplog: pytest.LogCaptureFixture) -> None:
    class OneClass(ClassifierAnchoring):
        @property
        def class_counts(self) -> Any:
            return np.array([14, 0, 0, 0, 0, 0])

    with caplog.at_level(logging.WARNING, logger="fedmed.fca"):
        anchored(cls=OneClass).begin_round({}, {})
        assert len(caplog.records) == 1 and "one class" in caplog.text
        kept = {name: torch.zeros(1) for name in HEAD}
        client = anchored(cls=OneClass)
        client.personal = kept
        client.begin_round({}, {})
    assert len(caplog.records) == 1


def test_no_test_items(anchored: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client = anchored()
    monkeypatch.setattr(client.data, "num_examples", lambda split: 0)
    for view in client.views:
        assert score_view(client, view) == ({"n/test": 0}, [])


def test_personal_logits_have_the_type_of_the_others() -> None:
    low = Output(torch.zeros(2, 3), None, {"personal_logits": torch.ones(2, 3, dtype=torch.bfloat16)})
    assert personal_logits(low).dtype == torch.float32
