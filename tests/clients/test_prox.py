"""FedProx add-on: value and gradient by hand, and what it leaves alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clients.local_norm import LocalNorm
from clients.prox import Proximal, ProximalParams
from clients.supervised import Supervised
from fedmed.federation.state import clone_state


def setting(mu: float) -> tuple[Proximal, Any]:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.copy_(torch.tensor([1.0]))
    received = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    return Proximal(ProximalParams(True, mu)), SimpleNamespace(
        model=model, received=received, device=torch.device("cpu")
    )


def test_squared_norm_by_hand() -> None:
    addon, client = setting(0.1)
    addon.begin_round(client, {}, {})
    term = addon.loss(client, None, None, 0)["prox"]  # type: ignore[arg-type]
    assert float(term.detach()) == pytest.approx(0.05 * 26)
    term.backward()
    torch.testing.assert_close(client.model.weight.grad, torch.tensor([[0.3, 0.4]]))


def test_reference_is_a_copy_and_can_be_used_every_step() -> None:
    addon, client = setting(1.0)
    client.received = dict(client.model.state_dict())  # shares the memory that training writes to
    addon.begin_round(client, {}, {})
    assert float(addon.loss(client, None, None, 0)["prox"].detach()) == 0.0  # type: ignore[arg-type]
    with torch.no_grad():
        client.model.bias.add_(2.0)
    for step in (1, 2):
        assert float(addon.loss(client, None, None, step)["prox"].detach()) == pytest.approx(2.0)  # type: ignore[arg-type]


def test_frozen_and_personal_parameters_are_left_out() -> None:
    addon, client = setting(1.0)
    client.model.weight.requires_grad_(False)
    addon.begin_round(client, {}, {})
    assert set(addon.reference) == {"bias"}
    client.received = {}
    addon.begin_round(client, {}, {})
    assert addon.loss(client, None, None, 0) == {}  # type: ignore[arg-type]


def drift(client: Any) -> float:
    received = clone_state(client.received)
    client.begin_round({}, {})
    for addon in client.addons.values():
        addon.begin_round(client, {}, {})
    client.fit()
    return sum(float((p.detach() - received[n]).norm()) for n, p in client.model.named_parameters() if n in received)


def test_strong_pull_keeps_the_model_near(new_client: Any) -> None:
    free = drift(new_client(Supervised))
    held = drift(new_client(Supervised, addons={"prox": {"enabled": True, "mu": 100.0}}))
    assert held < 0.8 * free


def test_rides_on_a_client_with_personal_entries(new_client: Any) -> None:
    client = new_client(LocalNorm, addons={"prox": {"enabled": True, "mu": 1.0}})
    assert drift(client) > 0
    assert set(client.addons["prox"].reference) == set(client.layout.trainable)


def test_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="mu >= 0"):
        ProximalParams(True, -1.0)
