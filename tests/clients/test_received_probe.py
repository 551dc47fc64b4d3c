"""The probes: what is measured, on which model, and that training is not disturbed by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.received_probe import AccuracyProbe, LossProbe, balanced_accuracy, mean_over_items
from clients.supervised import Supervised


def test_mean_over_items_by_hand() -> None:
    assert mean_over_items([torch.tensor(1.0), torch.tensor(4.0)], [2, 1]) == pytest.approx(2.0)
    assert math.isnan(mean_over_items([], []))
    assert math.isnan(mean_over_items([torch.tensor(math.nan), torch.tensor(1.0)], [1, 1]))
    assert mean_over_items([torch.tensor(math.inf), torch.tensor(1.0)], [1, 1]) == math.inf


def test_balanced_accuracy_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 2, 2])
    assert balanced_accuracy(labels, np.array([0, 0, 0, 1, 2, 1]), 4) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert balanced_accuracy(labels, np.array([0, 0, 0, 0, -1, -1]), 4) == pytest.approx(0.5)
    assert balanced_accuracy(labels, labels, 4) == 1.0
    assert math.isnan(balanced_accuracy(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 4))


def items(client: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the received model in eval mode and labels of the training split, item by item."""
    client.model.eval()
    batches = [client.train_set.batch(torch.tensor([k])) for k in range(len(client.train_set))]
    with torch.no_grad():
        logits = torch.cat([client.model(batch.images).logits for batch in batches])
    client.model.train()
    return logits, torch.cat([batch.targets for batch in batches])


def test_loss_is_that_of_the_received_model_over_all_items(new_client: Any) -> None:
    client = new_client(LossProbe)  # the split does not divide evenly into the batches of the sweep
    assert len(client.train_set) % 16
    logits, labels = items(client)
    client.begin_round({}, {})
    expected = float(F.cross_entropy(logits, labels))
    assert client.loss_received == pytest.approx(expected, rel=1e-5)
    client.fit()
    arrays, metrics = client.end_round()
    assert arrays == {} and metrics == {"loss_received": client.loss_received}
    assert float(F.cross_entropy(*items(client))) != pytest.approx(expected, rel=1e-3)  # training moved the model
    client.check_leaves(arrays, metrics)


def test_the_configured_loss_is_measured_as_it_is(new_client: Any) -> None:
    client = new_client(LossProbe, args={"loss": "logit_adjusted_ce"})
    logits, labels = items(client)
    client.begin_round({}, {})
    expected = F.cross_entropy(logits + client.prior().float(), labels)
    assert client.loss_received == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_loss_of_a_segmentation_site(new_client: Any, activation: str) -> None:
    client = new_client(LossProbe, "segmentation", activation)
    client.begin_round({}, {})
    assert math.isfinite(client.loss_received) and client.loss_received > 0


def test_accuracy_is_that_of_the_received_model(new_client: Any) -> None:
    client = new_client(AccuracyProbe)
    logits, labels = items(client)
    client.begin_round({}, {})
    predicted = logits.argmax(dim=1)
    recalls = [float((predicted[labels == c] == c).float().mean()) for c in labels.unique()]
    assert client.bacc_received == pytest.approx(sum(recalls) / len(recalls))
    client.fit()
    arrays, metrics = client.end_round()
    assert arrays == {} and metrics == {"bacc_received": client.bacc_received}
    client.check_leaves(arrays, metrics)


def test_a_model_that_gives_no_numbers_has_accuracy_zero(new_client: Any) -> None:
    client = new_client(AccuracyProbe)
    with torch.no_grad():
        for parameter in client.model.parameters():
            parameter.fill_(math.nan)
    client.begin_round({}, {})
    assert client.bacc_received == 0.0


@pytest.mark.parametrize(("probe", "name"), [(LossProbe, "loss_received"), (AccuracyProbe, "bacc_received")])
def test_a_site_without_items_says_nan(new_client: Any, probe: type[Supervised], name: str) -> None:
    client = new_client(probe)
    client.train_set = client.train_set.subset(torch.zeros(0, dtype=torch.int64))
    client.begin_round({}, {})
    assert math.isnan(client.end_round()[1][name])


@pytest.mark.parametrize("probe", [LossProbe, AccuracyProbe])
def test_training_is_that_of_the_plain_client(new_client: Any, probe: type[Supervised]) -> None:
    trained = []
    for cls in (Supervised, probe):
        client = new_client(cls)
        client.begin_round({}, {})
        result = client.fit()
        trained.append((result, {name: value.clone() for name, value in client.model.state_dict().items()}))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(value, trained[1][1][name]) for name, value in trained[0][1].items())
