"""Ditto at the site: the pull, the two models side by side, and that the global one does not notice."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.personal_model import Ditto, DittoParams, add_pull, copy_of_model, too_strong
from clients.supervised import Supervised
from fedmed.config import OptimizerConfig
from fedmed.data.loader import batches
from fedmed.errors import UserError
from fedmed.federation.state import State, clone_state

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=F64)


def with_optimizer(client: Any, *values: Any, **named: Any) -> Any:
    client.config = dataclasses.replace(client.config, optimizer=OptimizerConfig(*values, **named))
    return client


def round_of(client: Any, personal: State | None = None) -> Any:
    """What the site does with a train message."""
    client.personal = personal or {}
    client.load_view("personal")
    client.begin_round({}, {})
    client.losses = client.fit()
    assert client.end_round() == ({}, {})
    return client


def full(client: Any) -> State:
    return clone_state(client.model.state_dict())


def distance(client: Any) -> float:
    """‖v − w^t‖ over the trainable parameters."""
    names = client.layout.trainable
    return float(sum((client.personal[n] - client.received[n]).square().sum() for n in names).sqrt())


# ---------------------------------------------------------------------- equations


def test_pull_by_hand() -> None:
    gradient = number(5.0)
    add_pull([number(3.0)], [gradient], [number(1.0)], 0.25)
    assert gradient.tolist() == [5.5]
    add_pull([number(3.0)], [gradient], [number(1.0)], 0.0)
    assert gradient.tolist() == [5.5]


def test_pull_is_the_gradient_of_half_the_squared_distance() -> None:
    own, received = torch.randn(3, 2, dtype=F64, requires_grad=True), torch.randn(3, 2, dtype=F64)
    (0.7 / 2 * (own - received).square().sum()).backward()
    gradient = torch.zeros_like(received)
    add_pull([own], [gradient], [received], 0.7)
    torch.testing.assert_close(gradient, own.grad)


def test_limit_of_the_pull() -> None:
    """Descent on the pull alone shrinks the distance below the limit and blows it up above."""
    for lam, grows in ((19.0, False), (21.0, True)):
        value = number(1.0)
        for _ in range(5):
            gradient = torch.zeros_like(value)
            add_pull([value], [gradient], [number(0.0)], lam)
            value = value - 0.1 * gradient
        assert (abs(float(value)) > 1.0) == grows == too_strong(lam, 0.1, 0.0)
    assert not too_strong(30.0, 0.1, 0.9)


def test_copies_are_leaves_and_own_their_memory() -> None:
    linear = nn.Linear(2, 2)
    linear.bias.requires_grad_(False)
    model = nn.Sequential(linear, nn.BatchNorm1d(2))
    parameters, buffers = copy_of_model(model)
    assert set(parameters) == {"0.weight", "1.weight", "1.bias"}
    assert set(buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(p.is_leaf and p.requires_grad for p in parameters.values())
    assert parameters["0.weight"].data_ptr() != linear.weight.data_ptr()


# ---------------------------------------------------------------------- two models


OPTIMIZERS = [("sgd", {"lr": 0.05, "momentum": 0.5}), ("adam", {"lr": 0.01}), ("adam", {"persist": True})]


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_the_global_half_is_that_of_supervised(new_client: Any, name: str, settings: dict[str, Any]) -> None:
    plain = round_of(with_optimizer(new_client(Supervised), name, **settings))
    ditto = round_of(with_optimizer(new_client(Ditto, args={"lam": 1.0}), name, **settings))
    torch.testing.assert_close(full(ditto), full(plain), rtol=0, atol=0)
    assert ditto.losses == plain.losses
    moments = {k: v for k, v in ditto.personal.items() if k.startswith("optimizer/")}
    torch.testing.assert_close(moments, plain.personal, rtol=0, atol=0)


def test_the_global_half_with_dropout_and_augmentation(new_client: Any) -> None:
    states = []
    for cls in (Supervised, Ditto):
        client = new_client(cls)
        client.model.head = nn.Sequential()  # replaced below: dropout draws from torch's own generator
        client.model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, len(client.data.classes)))
        nn.init.constant_(client.model.head[1].weight, 0.01)
        nn.init.zeros_(client.model.head[1].bias)
        client.layout = type(client.layout).of(client.model, cls.is_personal)
        client.received = clone_state(client.layout.exchanged_state(client.model))
        client.augment = type(client.augment)(["hflip", "shift4"])
        torch.manual_seed(3)
        states.append(full(round_of(client)))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_without_pull_it_is_training_alone(new_client: Any) -> None:
    """λ = 0: v is what `supervised` makes of the kept v, norm statistics included."""
    start = full(round_of(new_client(Supervised)))
    ditto = round_of(new_client(Ditto, args={"lam": 0.0}), personal=start)
    alone = new_client(Supervised)
    received = alone.received
    alone.received = start
    torch.testing.assert_close(ditto.personal, full(round_of(alone)), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ditto.personal["head.bias"], full(ditto)["head.bias"])
    torch.testing.assert_close(ditto.received, received, rtol=0, atol=0)


def test_it_starts_as_the_received_model(new_client: Any) -> None:
    """λ = 0 and nothing kept: both models take the same steps."""
    ditto = round_of(new_client(Ditto, args={"lam": 0.0}))
    torch.testing.assert_close(ditto.personal, full(ditto), rtol=1e-5, atol=1e-6)


def test_more_pull_less_distance(new_client: Any) -> None:
    found = [
        distance(round_of(with_optimizer(new_client(Ditto, args={"lam": lam}), "sgd", lr=0.05)))
        for lam in (0.0, 1.0, 5.0, 20.0)
    ]
    assert found == sorted(found, reverse=True) and found[-1] < 0.7 * found[0] and found[-1] > 0


def test_a_far_model_is_pulled_back(new_client: Any) -> None:
    far = {n: v + 1.0 for n, v in new_client(Ditto).received.items() if v.is_floating_point()}
    ditto = round_of(with_optimizer(new_client(Ditto, args={"lam": 20.0}), "sgd", lr=0.05), personal=far)
    start = float(sum(v.numel() for n, v in far.items() if n in ditto.layout.trainable)) ** 0.5
    assert distance(ditto) < 0.5 * start


def test_one_step_by_hand(new_client: Any) -> None:
    """v ← v − η·(∇F(v) + λ(v − w^t)) against autograd on the whole objective, in float64."""
    client = with_optimizer(new_client(Ditto, args={"lam": 3.0}), "sgd", lr=0.1)
    client.model.double()
    client.received = {n: v.double() if v.is_floating_point() else v for n, v in client.received.items()}
    rng = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(client.received[n].shape, generator=rng, dtype=F64) for n in client.layout.trainable}
    kept = {n: client.received[n] + 0.1 * value for n, value in noise.items()}
    client.personal = kept
    client.load_view("personal")
    client.begin_round({}, {})
    client.model.train()
    batch = next(iter(batches(client.train_set, 4)))
    batch = dataclasses.replace(batch, images=batch.images.double())
    client.personal_step(batch, 0)

    leaves = {n: v.clone().requires_grad_() for n, v in kept.items()}
    output = torch.func.functional_call(client.model, leaves, (batch.images,))
    loss = sum(client.loss(output, batch, 0).values())
    (loss + 3.0 / 2 * sum((leaves[n] - client.received[n]).square().sum() for n in leaves)).backward()
    expected = {n: (v - 0.1 * v.grad).detach() for n, v in leaves.items()}
    torch.testing.assert_close({n: v.detach() for n, v in client.own.items()}, expected, rtol=1e-6, atol=1e-8)


def test_a_model_that_diverged_is_thrown_away(new_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = new_client(Ditto)
    kept = {n: v.clone() for n, v in client.received.items()}
    client.personal = kept
    client.load_view("personal")
    client.begin_round({}, {})
    client.fit()
    with torch.no_grad():
        client.own["head.bias"][0] = float("nan")
    with caplog.at_level(logging.WARNING):
        client.end_round()
    assert client.personal == kept and "personal model diverged in entry 'head.bias'" in caplog.text


def test_segmentation(new_client: Any) -> None:
    ditto = round_of(new_client(Ditto, "segmentation", "sigmoid"))
    assert set(ditto.personal) == set(ditto.layout.exchanged) and distance(ditto) > 0


def test_arguments(new_client: Any) -> None:
    inherited = {f.name for f in dataclasses.fields(Supervised.Params)}
    assert {"lam"} | inherited == {f.name for f in dataclasses.fields(DittoParams)}
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam >= 0"):
            DittoParams(lam=wrong)
    client = with_optimizer(new_client(Ditto, args={"lam": 30.0}), "sgd", lr=0.1)
    with pytest.raises(UserError, match=r"client\.args\.lam=30 with a learning rate of 0\.1 diverges"):
        client.begin_round({}, {})
