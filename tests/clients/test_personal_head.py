"""Client `personal_head`: which entries stay, and what it refuses; and the prior of the balanced softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clients.personal_head import PersonalHead
from clients.supervised import Params, Supervised
from fedmed.errors import UserError
from fedmed.federation.layout import Layout
from fedmed.losses.classification import logit_adjusted_cross_entropy


def test_the_classifier_stays_and_nothing_else(new_client: Any) -> None:
    client = new_client(PersonalHead)
    assert set(client.layout.personal) == {"head.weight", "head.bias"}
    assert not any(name.startswith("head") for name in client.received)
    assert client.views == ("personal",)


def test_an_own_classifier_under_the_received_extractor(new_client: Any) -> None:
    client = new_client(PersonalHead)
    own = torch.full_like(client.model.head.bias, 3.0)
    client.personal = {"head.bias": own}
    client.load_view("personal")
    state = client.model.state_dict()
    assert torch.equal(state["head.bias"], own)
    assert all(torch.equal(state[name], value) for name, value in client.received.items())


def test_it_is_trained(new_client: Any) -> None:
    client = new_client(PersonalHead)
    client.load_view("personal")
    before = client.model.head.weight.detach().clone()
    client.begin_round({}, {})
    client.fit()
    assert not torch.equal(client.model.head.weight, before)


def test_a_model_without_a_known_classifier_is_refused(new_client: Any) -> None:
    client = new_client(PersonalHead)
    client.layout = Layout.of(nn.Sequential(nn.Linear(2, 2)), PersonalHead.is_personal)
    with pytest.raises(UserError, match="`classifier_prefixes`"):
        client.begin_round({}, {})


def test_balanced_softmax(new_client: Any) -> None:
    """π of the site plus 1e-9: an absent class is pushed down by ln 1e-9 = −20.7 and no further."""
    args = {"loss": "logit_adjusted_ce", "prior_eps": 1e-9}
    client = new_client(Supervised, args=args)
    counts = torch.as_tensor(client.class_counts).double()
    torch.testing.assert_close(client.prior(), (counts / counts.sum() + 1e-9).log())
    batch, output = next(client.sweep("train"))
    found = client.loss(output, batch, 0)["logit_adjusted_ce"]
    torch.testing.assert_close(found, logit_adjusted_cross_entropy(output.logits, batch.targets, counts, eps=1e-9))
    absent = logit_adjusted_cross_entropy(output.logits, batch.targets, counts * (counts != counts.max()), eps=1e-9)
    assert bool(absent.isfinite())


def test_balanced_softmax_by_hand() -> None:
    logits, counts = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([9, 1])
    for label, expected in ((0, 0.105361), (1, 2.302585)):
        loss = logit_adjusted_cross_entropy(logits, torch.tensor([label]), counts, eps=1e-9)
        assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, -1e-9, float("nan")])
def test_a_prior_that_is_not_positive_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="prior_eps > 0 or null"):
        Params(prior_eps=eps)
