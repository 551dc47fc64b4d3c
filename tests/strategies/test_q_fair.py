"""q-FedAvg: the step by hand, against the formula as printed and against Flower's, both rules, and its edges."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy.qfedavg import compute_delta_and_h
from torch import Tensor

from fedmed.federation.messages import Update
from strategies.q_fair import FairStep, QFedAvg, QFedAvgParams, curvature, loss_weights

NAN, INF = math.nan, math.inf


def state(weight: float, variance: float = 1.0, seen: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    values = {"w": torch.tensor([weight], dtype=dtype), "running_var": torch.tensor([variance], dtype=dtype)}
    return {**values, "seen": torch.tensor(seen)}


def make(bench: SimpleNamespace, dtype: torch.dtype = torch.float64, **params: object) -> QFedAvg:
    rule = QFedAvg(QFedAvgParams(**params))  # type: ignore[arg-type]
    return bench.bound(rule, state(0.0, dtype=dtype), [("a", 4), ("b", 12)])  # type: ignore[no-any-return]


def replies(bench: SimpleNamespace, losses: list[float], weights: list[float] | None = None) -> list[Update]:
    weights = weights or [float(k + 1) for k in range(len(losses))]
    return [
        bench.update(f"s{k}", k, 10 * (k + 1), state(w, 1.0 + k, k), loss_received=loss)
        for k, (w, loss) in enumerate(zip(weights, losses, strict=True))
    ]


@pytest.mark.parametrize(
    ("q", "lipschitz", "expected"),
    [
        (0.0, 1.0, 1.5),
        (1.0, 1.0, 5 / 8),  # Δ = −1, −4; h = 1 + 1, 4 + 2
        (2.0, 2.0, 18 / 82),  # Δ = −2, −16; h = 8 + 2, 64 + 8
    ],
)
def test_step_by_hand(bench: SimpleNamespace, q: float, lipschitz: float, expected: float) -> None:
    rule = make(bench, q=q, lipschitz=lipschitz)
    new = rule.aggregate(1, state(0.0), iter(replies(bench, [1.0, 2.0])))
    assert float(new["w"]) == pytest.approx(expected, rel=1e-8)


def random_parameters(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in (("a", (3, 2)), ("b", (4,)))}


@pytest.mark.parametrize(("q", "lipschitz"), [(0.0, 3.0), (0.5, 1.0), (1.0, 10.0), (5.0, 0.1)])
def test_step_is_the_formula_as_printed_and_flowers(q: float, lipschitz: float) -> None:
    before, losses = random_parameters(0), [0.3, 1.7, 0.9]
    after = [random_parameters(k + 1) for k in range(3)]
    step = FairStep(before, q, lipschitz)
    for model, loss in zip(after, losses, strict=True):
        step.add(model, loss)
    found = step.result()
    assert found is not None

    total, bound = {n: torch.zeros_like(v) for n, v in before.items()}, 0.0
    flower_total, flower_bound = [np.zeros(v.shape) for v in before.values()], 0.0
    for model, loss in zip(after, [x + 1e-10 for x in losses], strict=True):
        gradient = {n: lipschitz * (v - model[n]) for n, v in before.items()}
        total = {n: v + loss**q * gradient[n] for n, v in total.items()}
        norm = sum(float(v.square().sum()) for v in gradient.values())
        bound += q * loss ** (q - 1) * norm + lipschitz * loss**q
        arrays = [v.numpy().copy() for v in before.values()], [v.numpy().copy() for v in model.values()]
        delta, h = compute_delta_and_h(*arrays, q, lipschitz, loss - 1e-10)
        flower_total = [x + y for x, y in zip(flower_total, delta, strict=True)]
        flower_bound += h
    for (name, value), flower in zip(before.items(), flower_total, strict=True):
        torch.testing.assert_close(found[name], value - total[name] / bound)
        np.testing.assert_allclose(found[name].numpy(), value.numpy() - flower / flower_bound)
    power = sum((loss + 1e-10) ** q for loss in losses)
    assert step.fraction == pytest.approx(lipschitz * power / bound)


def test_curvature_by_hand() -> None:
    assert curvature(2.0, 3.0, 0.5, 4.0) == pytest.approx(0.5 * 16 * 3 / 2 + 4)
    assert curvature(1.0, 0.0, 7.0, 4.0) == 4.0


@pytest.mark.parametrize("rule", ["gradient", "models"])
def test_q_zero_is_the_uniform_mean(bench: SimpleNamespace, rule: str) -> None:
    new = make(bench, q=0.0, rule=rule, lipschitz=7.0).aggregate(1, state(9.0), iter(replies(bench, [0.1, 5.0, 0.0])))
    assert float(new["w"]) == pytest.approx(2.0)


@pytest.mark.parametrize("rule", ["gradient", "models"])
def test_order_of_the_sites_does_not_matter(bench: SimpleNamespace, rule: str) -> None:
    sites = replies(bench, [0.3, 2.0, 0.7])
    expected = make(bench, q=3.0, rule=rule).aggregate(1, state(0.5), iter(sites))
    turned = make(bench, q=3.0, rule=rule).aggregate(1, state(0.5), iter([sites[k] for k in (1, 2, 0)]))
    for name, value in expected.items():
        torch.testing.assert_close(value, turned[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4])
def test_equal_sites_step_as_one(bench: SimpleNamespace, count: int) -> None:
    sites = replies(bench, [2.0] * count, [3.0] * count)
    models = make(bench, q=2.0, rule="models").aggregate(1, state(1.0), iter(sites))
    assert float(models["w"]) == pytest.approx(3.0)
    new = make(bench, q=2.0, lipschitz=0.5).aggregate(1, state(1.0), iter(sites))
    # one site: (w_k − w) / (1 + q L ‖w_k − w‖² / F) = 2 / (1 + 2 · .5 · 4 / 2)
    assert float(new["w"]) == pytest.approx(1.0 + 2.0 / 3.0)


def test_weights_of_the_losses() -> None:
    np.testing.assert_allclose(loss_weights(np.array([1.0, 3.0]), 1.0), [0.25, 0.75], rtol=1e-9)
    np.testing.assert_allclose(loss_weights(np.array([1.0, 3.0]), 2.0), [0.1, 0.9], rtol=1e-9)
    np.testing.assert_allclose(loss_weights(np.array([0.01, 0.02, 0.02]), 1e6), [0, 0.5, 0.5])  # .02^q alone is 0
    np.testing.assert_allclose(loss_weights(np.array([0.0, 0.0]), 100.0), [0.5, 0.5])
    np.testing.assert_allclose(loss_weights(np.array([NAN, 1.0, INF, 1.0, -1.0]), 2.0), [0, 0.5, 0, 0.5, 0])
    assert loss_weights(np.array([NAN, INF]), 1.0).tolist() == [0, 0]
    assert loss_weights(np.zeros(0), 1.0).size == 0


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_large_power_stays_in_range(bench: SimpleNamespace, order: list[int]) -> None:
    sites = replies(bench, [0.01, 0.02, 0.04])
    rule = make(bench, q=5000.0, lipschitz=1e-9)
    new = rule.aggregate(1, state(0.0), iter([sites[k] for k in order]))
    assert float(new["w"]) == pytest.approx(3.0 / (1 + 5000.0 * 1e-9 * 9.0 / 0.04))  # the worst site alone


@pytest.mark.parametrize("bad", [NAN, INF, -1.0])
@pytest.mark.parametrize("rule", ["gradient", "models"])
def test_a_loss_without_meaning_leaves_the_site_out(bench: SimpleNamespace, rule: str, bad: float) -> None:
    both = make(bench, rule=rule).aggregate(1, state(0.0), iter(replies(bench, [1.0, bad])))
    alone = make(bench, rule=rule).aggregate(1, state(0.0), iter(replies(bench, [1.0])))
    assert both == alone
    tested, kept = make(bench, rule=rule), state(4.0)
    assert tested.aggregate(1, kept, iter(replies(bench, [bad, bad]))) is kept
    assert tested.notes["weights"] == {"s0": 0.0, "s1": 0.0} and tested.notes["largest_weight"] == 0.0
    assert tested.aggregate(1, kept, iter([])) is kept


def test_a_reply_without_the_loss_is_left_out(bench: SimpleNamespace) -> None:
    kept = state(4.0)
    assert make(bench).aggregate(1, kept, iter([bench.update("a", 0, 1, state(1.0))])) is kept


def test_a_loss_of_zero_is_defined(bench: SimpleNamespace) -> None:
    new = make(bench, q=0.5, lipschitz=1.0).aggregate(1, state(0.0), iter(replies(bench, [0.0, 0.0])))
    assert math.isfinite(float(new["w"]))


def test_buffers_and_counters_do_not_step(bench: SimpleNamespace) -> None:
    before = state(0.0, 9.0)
    new = make(bench, q=1.0, lipschitz=1.0).aggregate(1, before, iter(replies(bench, [1.0, 2.0])))
    assert float(new["running_var"]) == pytest.approx((10 * 1.0 + 20 * 2.0) / 30) and int(new["seen"]) == 1
    assert float(before["w"]) == 0.0 and float(before["running_var"]) == 9.0


def test_dtype_stays(bench: SimpleNamespace) -> None:
    half = torch.float16
    update = bench.update("a", 0, 4, state(2.0, dtype=half), loss_received=1.0)
    new = make(bench, half, lipschitz=1e-6).aggregate(1, state(1.0, dtype=half), iter([update]))
    assert new["w"].dtype == half and float(new["w"]) == pytest.approx(2.0, rel=1e-3)


def test_an_entry_not_sent_counts_as_not_moved(bench: SimpleNamespace) -> None:
    rule = bench.bound(QFedAvg(QFedAvgParams(q=0.0)), {"w": torch.zeros(1), "v": torch.zeros(1)}, [("a", 1)])
    full = bench.update("a", 0, 1, {"w": torch.ones(1), "v": torch.ones(1)}, loss_received=1.0)
    part = bench.update("b", 1, 1, {"w": torch.ones(1)}, loss_received=1.0)
    new = rule.aggregate(1, {"w": torch.zeros(1), "v": torch.zeros(1)}, iter([full, part]))
    assert float(new["w"]) == pytest.approx(1.0) and float(new["v"]) == pytest.approx(0.5)


def test_the_scale_is_the_inverse_of_the_learning_rate_unless_set(
    bench: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    sites = replies(bench, [1.0, 2.0])
    default = make(bench, q=1.0)
    with caplog.at_level(logging.WARNING):
        found = default.aggregate(1, state(0.0), iter(sites))
    assert "set strategy.args.lipschitz" in caplog.text  # the optimiser of the bench is Adam
    given = make(bench, q=1.0, lipschitz=1.0 / default.config.optimizer.lr).aggregate(1, state(0.0), iter(sites))
    assert float(found["w"]) == float(given["w"])
    assert 0 < default.notes["step_fraction"] < 0.01


def test_one_reply_in_memory(bench: SimpleNamespace) -> None:
    alive: list[weakref.ref[Update]] = []
    most = []

    def stream() -> Iterator[Update]:
        for k in range(4):
            most.append(sum(ref() is not None for ref in alive))
            update = bench.update(f"s{k}", k, 1, state(1.0), loss_received=1.0)
            alive.append(weakref.ref(update))
            yield update
            del update

    make(bench).aggregate(1, state(0.0), stream())
    assert most == [0, 0, 0, 0]


def test_gradients_stay_on_while_the_sites_train(bench: SimpleNamespace) -> None:
    def stream() -> Iterator[Update]:
        assert torch.is_grad_enabled()  # on the local engine a site trains inside the loop over replies
        yield bench.update("a", 0, 1, state(1.0), loss_received=1.0)

    make(bench).aggregate(1, state(0.0), stream())


@pytest.mark.parametrize("wrong", [{"q": -1.0}, {"q": INF}, {"lipschitz": 0.0}, {"rule": "both"}])
def test_values_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        QFedAvgParams(**wrong)  # type: ignore[arg-type]
