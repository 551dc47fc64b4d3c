"""SCAFFOLD at the site: corrected gradients, the new control variate, and what is kept and sent."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.control_variates import (
    CHANGE,
    CONTROL,
    OWN,
    ControlVariates,
    change,
    correct_gradients,
    new_own,
    travelled_gradient,
    with_prefix,
    without_prefix,
)
from clients.supervised import Supervised
from fedmed.config import OptimizerConfig
from fedmed.data.split import Split
from fedmed.errors import FedMedError, UserError
from fedmed.federation.state import State, clone_state

F64 = torch.float64


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=F64)


def sgd(client: Any, **values: Any) -> Any:
    client.config = dataclasses.replace(client.config, optimizer=OptimizerConfig("sgd", **{"lr": 0.05, **values}))
    return client


def trained(client: Any) -> State:
    return clone_state({n: p.detach() for n, p in client.model.named_parameters()})


def noise(like: State, seed: int, scale: float = 0.01) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(value.shape, generator=rng) for name, value in like.items()}


# ---------------------------------------------------------------------- equations


def test_new_own_by_hand() -> None:
    # Two steps of 0.5 went from 3 to 1: mean direction 2, of which c − c_i = 0.5 was the correction.
    assert travelled_gradient(number(3.0), number(1.0), 2, 0.5).tolist() == [2.0]
    after = new_own({"w": number(3.0)}, {"w": number(1.0)}, {"w": number(0.75)}, {"w": number(0.25)}, 2, 0.5)
    assert after["w"].tolist() == [1.5]
    assert change(after, {"w": number(0.25)})["w"].tolist() == [1.25]


def test_without_control_variates_it_is_the_mean_gradient() -> None:
    after = new_own({"w": number(3.0)}, {"w": number(1.0)}, {}, {}, 2, 0.5)
    assert after["w"].tolist() == [2.0] and change(after, {})["w"].tolist() == [2.0]


def test_no_step_changes_nothing() -> None:
    for control, own in (({"w": number(7.0)}, {"w": number(0.25)}), ({}, {"w": number(0.25)})):
        after = new_own({"w": number(3.0)}, {"w": number(3.0)}, control, own, 0, 0.5)
        assert after["w"].tolist() == [0.25] and change(after, own)["w"].tolist() == [0.0]
    assert new_own({"w": number(3.0)}, {"w": number(3.0)}, {"w": number(7.0)}, {}, 0, 0.5)["w"].tolist() == [0.0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_option_two_is_the_mean_of_the_uncorrected_gradients(weight_decay: float) -> None:
    """Hand-made descent on (w − 2)²/2 with SGD itself; weight decay belongs to the gradient."""
    w, control, own = nn.Parameter(number(1.0)), {"w": number(0.7)}, {"w": number(-0.2)}
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=weight_decay)
    gradients = []
    for _ in range(3):
        w.grad = w.detach() - 2.0
        gradients.append(w.detach() - 2.0 + weight_decay * w.detach())
        correct_gradients({"w": w}, control, own)
        optimizer.step()
    after = new_own({"w": number(1.0)}, {"w": w.detach()}, control, own, 3, 0.1)
    torch.testing.assert_close(after["w"], torch.stack(gradients).mean(0))


def test_gradients_are_corrected_in_place() -> None:
    used, unused = nn.Parameter(number(1.0)), nn.Parameter(number(1.0))
    used.grad = gradient = number(5.0)
    parameters = {"used": used, "unused": unused}
    control, own = {n: number(3.0) for n in parameters}, {n: number(1.0) for n in parameters}
    correct_gradients(parameters, {}, {})
    assert used.grad.tolist() == [5.0] and unused.grad is None
    correct_gradients(parameters, control, own)
    assert used.grad is gradient and gradient.tolist() == [7.0]
    assert unused.grad is not None and unused.grad.tolist() == [2.0]
    correct_gradients(parameters, control, {})
    assert gradient.tolist() == [10.0]
    correct_gradients(parameters, {}, own)
    assert gradient.tolist() == [9.0] and control["used"].tolist() == [3.0] and own["used"].tolist() == [1.0]


def test_prefixes() -> None:
    state = {"a.weight": number(1.0)}
    assert without_prefix({**with_prefix(state, OWN), "optimizer/a.weight": number(2.0)}, OWN) == state


# ---------------------------------------------------------------------- client


def test_first_round_trains_as_supervised(new_client: Any) -> None:
    plain, client = sgd(new_client(Supervised)), sgd(new_client(ControlVariates))
    for each in (plain, client):
        each.begin_round({}, {})
        each.losses = each.fit()
    assert client.losses == plain.losses
    torch.testing.assert_close(trained(client), trained(plain), rtol=0, atol=0)
    arrays, metrics = client.end_round()
    assert metrics == {} and set(arrays) == {CHANGE + n for n in client.layout.trainable}
    assert client.num_steps == 4
    client.check_leaves(arrays, metrics)
    kept = without_prefix(client.personal, OWN)
    expected = {n: (client.received[n] - v) / (4 * 0.05) for n, v in trained(client).items()}
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(without_prefix(arrays, CHANGE), expected)


def test_a_step_is_shifted_by_the_difference(new_client: Any) -> None:
    """One step: trained = supervised − η·(c − c_i), and c_i⁺ is the gradient whatever c and c_i are."""
    ends, kept = [], []
    for corrected in (False, True):
        client = sgd(new_client(ControlVariates))
        client.config = dataclasses.replace(
            client.config, training=dataclasses.replace(client.config.training, max_steps=1)
        )
        parameters = {n: client.received[n] for n in client.layout.trainable}
        control, own = noise(parameters, 1), noise(parameters, 2)
        if corrected:
            client.personal = with_prefix(own, OWN)
        client.begin_round({}, with_prefix(control, CONTROL) if corrected else {})
        client.fit()
        sent = without_prefix(client.end_round()[0], CHANGE)
        ends.append(trained(client))
        kept.append(without_prefix(client.personal, OWN))
        if corrected:
            torch.testing.assert_close(sent, {n: kept[1][n] - own[n] for n in own})
    torch.testing.assert_close(ends[1], {n: v - 0.05 * (control[n] - own[n]) for n, v in ends[0].items()})
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-3, atol=1e-4)  # a difference of weights, divided by η


def test_what_it_receives_is_not_written(new_client: Any) -> None:
    client = sgd(new_client(ControlVariates))
    control, own = noise(trained(client), 1), noise(trained(client), 2)
    copies = clone_state(control), clone_state(own), clone_state(client.received)
    client.personal = {**with_prefix(own, OWN), "optimizer/x": torch.ones(1)}
    client.begin_round({}, with_prefix(control, CONTROL))
    client.fit()
    client.end_round()
    torch.testing.assert_close((control, own, client.received), copies, rtol=0, atol=0)
    assert "optimizer/x" in client.personal


def test_zero_steps(new_client: Any) -> None:
    """One image and batches of several: no step, so c_i stays and the change is zero."""
    client = sgd(new_client(ControlVariates))
    own = noise(trained(client), 2)
    client.personal = with_prefix(own, OWN)
    client.train_set = first_item(client.train_set)
    client.begin_round({}, with_prefix(noise(own, 1), CONTROL))
    client.fit()
    sent, _ = client.end_round()
    assert client.num_steps == 0 and not any(bool(v.any()) for v in sent.values())
    torch.testing.assert_close(without_prefix(client.personal, OWN), own, rtol=0, atol=0)


def first_item(split: Split) -> Any:
    """A split that says it has one item."""

    class One:
        device, ignore_value = split.device, split.ignore_value

        def __len__(self) -> int:
            return 1

    return One()


def test_what_diverged_is_not_kept(new_client: Any) -> None:
    client = sgd(new_client(ControlVariates))
    client.begin_round({}, {})
    client.fit()
    with torch.no_grad():
        client.model.head.bias[0] = float("inf")
    with pytest.raises(FedMedError, match=r"'head\.bias' is not finite: the local training diverged"):
        client.end_round()
    assert client.personal == {}


@pytest.mark.parametrize("wrong", [OptimizerConfig("adam"), OptimizerConfig("sgd", momentum=0.9)])
def test_only_plain_sgd(new_client: Any, wrong: OptimizerConfig) -> None:
    client = new_client(ControlVariates)
    client.config = dataclasses.replace(client.config, optimizer=wrong)
    with pytest.raises(
        UserError, match=rf"plain SGD, got {wrong.name} .* set optimizer\.name=sgd optimizer\.momentum=0"
    ):
        client.begin_round({}, {})


def test_the_client_is_freed_without_the_collector(new_client: Any) -> None:
    client = sgd(new_client(ControlVariates))
    client.begin_round({}, {})
    client.fit()
    gone = weakref.ref(client)
    gc.disable()
    try:
        del client
        assert gone() is None
    finally:
        gc.enable()
