"""FedMix at the server: weights by hand, the two sums against the list of replies, who has no part, and edges."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.cross_pseudo import SelectionRule
from fedmed.config import params_from
from fedmed.errors import UserError
from fedmed.federation.messages import Update
from fedmed.federation.state import weighted_mean
from strategies.selected_loss import FedMix, FedMixParams, TwoSums, aggregation_weights, combined, loss_power, share

NAN, INF = math.nan, math.inf
GLOBAL = {"net1.w": torch.tensor([9.0]), "net2.running_mean": torch.tensor([9.0]), "net1.steps": torch.tensor(1)}


def weights(n: list[float], loss: list[float], lambda_: float = 10.0, beta: float = 1.5) -> list[float]:
    return list(aggregation_weights(np.array(n, dtype=float), np.array(loss, dtype=float), lambda_, beta).tolist())


def test_weights_by_hand() -> None:
    loss = np.array([0.42, 0.18, 0.09])
    np.testing.assert_allclose([loss_power(x, 1.5) for x in loss], [0.272191, 0.076368, 0.027], atol=1e-6)
    np.testing.assert_allclose(share(loss**1.5), [0.724763, 0.203344, 0.071893], atol=1e-6)
    parts = share(np.array([60.0, 110.0, 130.0])) + 10 * share(loss**1.5)
    np.testing.assert_allclose(parts, [7.447633, 2.400105, 1.152262], atol=1e-5)
    assert weights([60, 110, 130], loss.tolist()) == pytest.approx([0.677058, 0.218191, 0.104751], abs=1e-6)


def test_a_site_without_selected_images_has_no_part() -> None:
    """The bare formula gives it 22 %."""
    bare = combined(share(np.array([40.0, 0.0, 500.0])), share(np.full(3, 0.2) ** 3), 2.0)
    assert bare.tolist() == pytest.approx([(0.074074 + 0.666667) / 3, 0.222222, 0.530864], abs=1e-6)
    assert weights([40, 0, 500], [0.2] * 3, 2, 3) == pytest.approx([0.358025, 0, 0.641975], abs=1e-6)


@pytest.mark.parametrize(
    ("n", "loss", "expected"),
    [
        ([], [], []),
        ([5], [0.3], [1.0]),
        ([5], [0.0], [1.0]),
        ([0, 0], [0.3, 0.2], [0.0, 0.0]),
        ([5, 5], [NAN, INF], [0.0, 0.0]),
        ([30, 10], [0.0, 0.0], [0.75, 0.25]),
        ([30, 10], [-1e-8, 0.0], [0.75, 0.25]),  # rounding of a Dice loss
        ([30, 10, 99], [0.2, 0.2, NAN], [1.25 / 2, 0.75 / 2, 0.0]),
        ([30, 10, 99], [0.2, 0.2, 1e300], [1.25 / 2, 0.75 / 2, 0.0]),
        ([30, 10], [0.5, 0.0], [1.75 / 2, 0.25 / 2]),
    ],
)
def test_edges(n: list[float], loss: list[float], expected: list[float]) -> None:
    assert weights(n, loss, lambda_=1.0, beta=2.0) == pytest.approx(expected)


def test_powers() -> None:
    assert loss_power(0.5, 2.0) == 0.25 and loss_power(0.0, 0.0) == 1.0 and loss_power(-1e-8, 1.5) == 0.0
    assert math.isnan(loss_power(NAN, 1.0)) and math.isnan(loss_power(INF, 1.0)) and math.isnan(loss_power(-INF, 2.0))
    assert math.isnan(loss_power(1e300, 2.0)) and math.isnan(loss_power(1e16, 2.0)) and loss_power(1e-16, 2.0) == 0.0


def test_lambda_zero_is_the_mean_by_selected_images_and_beta_zero_levels_the_losses() -> None:
    assert weights([30, 10], [0.9, 0.1], lambda_=0.0) == [0.75, 0.25]
    assert weights([30, 10], [0.9, 0.1], lambda_=1.0, beta=0.0) == pytest.approx([0.625, 0.375])


def test_scales_and_order_do_not_matter() -> None:
    n, loss = [12.0, 7.0, 0.0, 40.0], [0.31, 0.07, 0.5, 0.92]
    expected = weights(n, loss)
    assert sum(expected) == pytest.approx(1.0)
    assert weights([3 * x for x in n], [0.5 * x for x in loss]) == pytest.approx(expected)
    turned = weights(n[::-1], loss[::-1])
    assert turned[::-1] == pytest.approx(expected)
    assert weights([5, 5, 5], [0.3, 0.3, 0.3]) == pytest.approx([1 / 3] * 3)


def states(count: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [
        {"net1.w": torch.randn(3, 2, generator=rng, dtype=dtype), "net2.w": torch.randn(4, generator=rng, dtype=dtype),
         "net1.steps": torch.tensor(7 - k)}
        for k in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("loss", [[0.42, 0.18, 0.09, 0.0], [0.0] * 4, [0.1, NAN, 0.7, 0.3], [NAN] * 4])
@pytest.mark.parametrize(("lambda_", "beta"), [(10.0, 1.5), (2.0, 3.0), (0.0, 1.0)])
def test_two_sums_are_the_list_of_replies(loss: list[float], lambda_: float, beta: float) -> None:
    n, made = [60, 110, 0, 130], states(4)
    sums = TwoSums(lambda_, beta)
    for state, size, value in zip(made, n, loss, strict=True):
        sums.add(state, size, value)
    found, expected = sums.result(), weighted_mean(zip(weights(n, loss, lambda_, beta), made, strict=True))
    if expected is None:
        assert found is None
        return
    assert found is not None and list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_small_loss_does_not_drown_in_single_precision() -> None:
    sums, made = TwoSums(10.0, 10.0), states(2, torch.float32)
    for state in made:
        sums.add(state, 5, 1e-4)  # the power is 1e-40
    found = sums.result()
    assert found is not None
    torch.testing.assert_close(found["net1.w"], (made[0]["net1.w"] + made[1]["net1.w"]) / 2)


def reply(site: str, n: int, value: float, loss: float | None, steps: int = 1) -> Update:
    arrays = {
        "net1.w": torch.tensor([value]),
        "net2.running_mean": torch.tensor([-value]),
        "net1.steps": torch.tensor(steps),
    }
    metrics: dict[str, Any] = {"num_selected": n, "num_total": 50}
    return Update(
        site, ord(site) - 97, n, arrays, {}, metrics if loss is None else {**metrics, "train_loss_net1": loss}
    )


def rule(bench: SimpleNamespace, kind: str = "mask", **params: Any) -> FedMix:
    made: FedMix = bench.bound(FedMix(FedMixParams(**params)), GLOBAL, [("a", 50), ("b", 50), ("c", 50)])
    made.roster = {name: replace(site, label_kind=kind) for name, site in made.roster.items()}
    return made


def test_a_round_by_hand(bench: SimpleNamespace) -> None:
    """Sites a and b: w = (.75 + .2) / 2 and (.25 + .8) / 2; c made no step."""
    mix = rule(bench, lambda_=1.0, beta=2.0)
    updates = [
        reply("a", 30, 1.0, 0.1, steps=4),
        reply("b", 10, 3.0, 0.2, steps=3),
        reply("c", 1, 100.0, None, steps=99),
    ]
    new = mix.aggregate(1, GLOBAL, iter(updates))
    assert float(new["net1.w"]) == pytest.approx(0.475 * 1 + 0.525 * 3)
    assert float(new["net2.running_mean"]) == pytest.approx(-float(new["net1.w"]))  # both networks alike
    assert int(new["net1.steps"]) == 4 and new["net1.steps"].dtype == torch.int64 and float(GLOBAL["net1.w"]) == 9.0
    assert mix.notes["weights"] == pytest.approx({"a": 0.475, "b": 0.525, "c": 0.0})
    assert mix.notes["num_selected"] == {"a": 30, "b": 10, "c": 1} and mix.notes["num_total"]["a"] == 50
    assert mix.notes["train_loss_net1"]["b"] == 0.2 and mix.notes["largest_weight"] == pytest.approx(0.525)


def test_a_broken_loss_keeps_a_site_out_whatever_it_sent(bench: SimpleNamespace) -> None:
    sound = [reply("a", 30, 1.0, 0.1), reply("b", 10, 3.0, 0.2)]
    for loss in (NAN, INF, 1e300):
        new = rule(bench).aggregate(1, GLOBAL, [*sound, reply("c", 10, 1e30, loss)])
        torch.testing.assert_close(new, rule(bench).aggregate(1, GLOBAL, sound))


def test_nobody_eligible_keeps_both_networks(bench: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert rule(bench).aggregate(2, GLOBAL, []) is GLOBAL
        assert rule(bench).aggregate(2, GLOBAL, [reply("a", 5, 1.0, NAN)]) is GLOBAL
    assert caplog.text.count("both networks stay") == 2


def test_one_site_gives_its_networks(bench: SimpleNamespace) -> None:
    new = rule(bench).aggregate(1, GLOBAL, [reply("b", 3, 4.0, 0.7, steps=6)])
    assert float(new["net1.w"]) == pytest.approx(4.0) and int(new["net1.steps"]) == 6


def test_one_reply_is_held_at_a_time(bench: SimpleNamespace) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def replies() -> Iterator[Update]:
        for site in "abc":
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            made = reply(site, 10, 1.0, 0.3)
            alive[:] = [weakref.ref(made.arrays["net1.w"])]
            yield made
            del made

    rule(bench).aggregate(1, GLOBAL, replies())


def test_a_federation_without_masks_is_warned_once(bench: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rule(bench).aggregate(1, GLOBAL, [reply("a", 5, 1.0, 0.3)])
        assert "no site has masks" not in caplog.text
        mix = rule(bench, kind="box")
        for number in (1, 2):
            mix.aggregate(number, GLOBAL, [reply("a", 5, 1.0, 0.3)])
    assert caplog.text.count("no site has masks") == 1 and "box" in caplog.text


def test_payload_is_the_rule_the_site_reads(bench: SimpleNamespace) -> None:
    arrays, config = rule(bench).payload(1, "a")
    assert arrays == {} and SelectionRule.of(config) == SelectionRule() == SelectionRule.of({})
    changed = {"threshold": 0.7, "box_dice_min": 0.2, "reject_empty": False, "reject_empty_unlabelled": True}
    assert SelectionRule.of(rule(bench, **changed).payload(1, "a")[1]) == SelectionRule(**changed)


@pytest.mark.parametrize(
    "args",
    [
        {"lambda_": -1},
        {"lambda_": INF},
        {"beta": -0.1},
        {"beta": NAN},
        {"threshold": 1.1},
        {"box_dice_min": -0.1},
        {"lam": 1},
    ],
)
def test_bad_parameters_are_user_errors(args: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"strategy\.args"):
        params_from(FedMixParams, args, "strategy.args")
