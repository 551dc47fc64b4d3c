"""FedBN: which entries are personal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from clients.local_norm import LocalNorm
from fedmed.errors import UserError
from fedmed.federation.layout import Layout


def test_all_kinds_of_normalisation_are_personal() -> None:
    norms = [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm(4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *norms, nn.Linear(4, 2))
    layout = Layout.of(model, LocalNorm.is_personal)
    assert layout.exchanged == ("0.weight", "0.bias", "5.weight", "5.bias")
    assert {name.split(".")[0] for name in layout.personal} == {"1", "2", "3", "4"}
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(layout.personal)


def test_judged_by_the_personal_view() -> None:
    assert LocalNorm.views == ("personal",)


def test_model_with_norms_trains(new_client: Any) -> None:
    client = new_client(LocalNorm)
    client.begin_round({}, {})
    assert client.layout.personal and client.fit()["train_loss"] > 0


def test_model_without_norms_is_refused(new_client: Any) -> None:
    client = new_client(LocalNorm)
    client.layout = SimpleNamespace(personal=())
    with pytest.raises(UserError, match="FedBN keeps normalisation layers"):
        client.begin_round({}, {})
