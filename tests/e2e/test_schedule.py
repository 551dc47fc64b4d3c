"""Learning rate by round: hand-worked values, edges, and that a site trains with it."""

from __future__ import annotations

from typing import Any

import pytest

from fedmed.federation.schedule import learning_rate, multistep, polynomial
from fedmed.schema import OptimizerConfig


def test_milestones_count_from_their_round_on() -> None:
    rates = [multistep(1.0, r, [3, 5], 0.1) for r in range(1, 7)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert multistep(0.5, 9, [], 0.1) == 0.5


def test_polynomial_by_hand() -> None:
    assert polynomial(2e-4, 151, 300, 0.9) == 1.0718e-4
    assert polynomial(2e-4, 1, 300, 0.9) == 2e-4
    assert polynomial(1e-9, 2, 2, 0.9) > 0  # rounding must not stop the training
    assert polynomial(0.1, 1, 0, 0.9) == 0.1


def test_the_schedule_of_a_configuration() -> None:
    assert learning_rate(OptimizerConfig(lr=0.1), 7, 10) == 0.1
    step = OptimizerConfig(lr=0.1, schedule="multistep", milestones=[2], factor=0.5)
    assert [learning_rate(step, r, 3) for r in (1, 2, 3)] == [0.1, 0.05, 0.05]
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="poly", power=1.0), 6, 10) == 0.5


def test_sites_train_with_the_rate_of_the_round(lab: Any) -> None:
    """One site, one full batch and plain SGD: what is left of a step after the milestone is its tenth."""
    settings = {"optimizer.name": "sgd", "optimizer.lr": 0.05, "training.max_steps": 1, "federation.rounds": 2}
    plain, _ = lab.run(**settings)
    late, _ = lab.run(**settings, **{"optimizer.schedule": "multistep", "optimizer.milestones": [2]})
    first, _ = lab.run(**{**settings, "federation.rounds": 1})
    name = "head.weight"
    step = lab.state(plain)[name] - lab.state(first)[name]
    small = lab.state(late)[name] - lab.state(first)[name]
    assert small.abs().max() > 0 and (small - 0.1 * step).abs().max() < 1e-3 * step.abs().max()


def test_a_run_with_a_polynomial_schedule_keeps_its_length(lab: Any) -> None:
    from fedmed.errors import UserError

    poly = {"optimizer.schedule": "poly", "optimizer.lr": 0.01}
    out = lab.new()
    lab.stopped(out, 1, **poly)
    with pytest.raises(UserError, match="another configuration"):
        lab.run(out, options={"resume": True}, **{**poly, "federation.rounds": 5})
