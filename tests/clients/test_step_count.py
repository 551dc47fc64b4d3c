"""FedNova at the site: the steps are counted, and nothing else is different."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from clients.step_count import StepCount
from clients.supervised import Supervised
from fedmed.federation.state import clone_state


def limited(client: Any, **training: Any) -> Any:
    client.config = dataclasses.replace(client.config, training=dataclasses.replace(client.config.training, **training))
    return client


@pytest.mark.parametrize(
    ("training", "steps"), [({}, 4), ({"epochs": 3}, 12), ({"max_steps": 3}, 3), ({"batch_size": 5}, 3)]
)
def test_steps_are_counted(new_client: Any, training: dict[str, int], steps: int) -> None:
    client = limited(new_client(StepCount), **training)  # 14 of the 20 images are for training
    client.begin_round({}, {})
    client.fit()
    arrays, metrics = client.end_round()
    assert (arrays, metrics) == ({}, {"num_steps": steps})
    client.check_leaves(arrays, metrics)


def test_no_step_is_zero(new_client: Any) -> None:
    client = new_client(StepCount)
    client.begin_round({}, {})
    assert client.end_round()[1] == {"num_steps": 0}


def test_trains_as_supervised(new_client: Any) -> None:
    states = []
    for cls in (Supervised, StepCount):
        client = new_client(cls)
        client.begin_round({}, {})
        client.fit()
        states.append(clone_state(client.model.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
