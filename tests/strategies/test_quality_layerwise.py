"""FedA3I at the server: quality weights (R1), depth schedule, two-sum aggregation, and the rule around them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmed.errors import UserError
from strategies.quality_layerwise import (
    FedA3I,
    FedA3IParams,
    aggregate_layerwise,
    alpha_by_group,
    feature_rows,
    layer_weights,
    quality_weights,
    shares,
)

NAN = float("nan")
HAND = np.array([[0.9, 0.1], [0.7, 0.1], [0.5, 0.1], [0.1, 0.6], [0.1, 0.8]])
STAGES = ("inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4", "outc")


def test_quality_by_hand() -> None:
    found = quality_weights(HAND, np.ones(5))
    np.testing.assert_allclose(found.weights, [0, 1 / 6, 1 / 3, 1 / 2, 0], atol=1e-12)
    assert found.group.tolist() == [1, 1, 1, 0, 0]


def test_mass_of_the_groups() -> None:
    found = quality_weights(HAND, np.ones(5), expansion_mass=0.2)
    np.testing.assert_allclose(found.weights, [0, 0.2 / 3, 0.4 / 3, 0.8, 0], atol=1e-12)


def test_quality_does_not_depend_on_site_order() -> None:
    order = [4, 2, 0, 3, 1]
    moved = quality_weights(HAND[order], np.ones(5))
    np.testing.assert_allclose(moved.weights, quality_weights(HAND, np.ones(5)).weights[order], atol=1e-12)


def test_equal_features_give_size_weights() -> None:
    found = quality_weights(np.tile([0.3, 0.2], (4, 1)), np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(found.weights, [0.1, 0.2, 0.3, 0.4])
    assert found.group.tolist() == [-1] * 4


def test_group_of_one_takes_its_mass() -> None:
    found = quality_weights(HAND[:4], np.full(4, 10.0))
    np.testing.assert_allclose(found.weights, [0, 1 / 6, 1 / 3, 1 / 2], atol=1e-12)


def test_site_without_features_has_the_weight_of_its_size() -> None:
    features = np.array([[0.9, 0.1], [0.7, 0.1], [NAN, NAN], [0.1, 0.6], [0.1, 0.8]])
    found = quality_weights(features, np.array([10.0, 10.0, 20.0, 10.0, 10.0]))
    np.testing.assert_allclose(found.weights, [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=1e-12)
    assert found.group.tolist() == [1, 1, -1, 0, 0]


@pytest.mark.parametrize(
    "features",
    [
        np.full((3, 2), NAN),
        np.array([[0.5, 0.1], [NAN, 0.2], [NAN, NAN]]),
        np.array([[1e200, 0], [3e200, 0], [-2e200, 1.0]]),
    ],
    ids=["nobody valid", "one valid", "overflow"],
)
def test_no_split_gives_size_weights(features: np.ndarray) -> None:
    found = quality_weights(features, np.array([1.0, 1.0, 2.0]))
    np.testing.assert_allclose(found.weights, [0.25, 0.25, 0.5])
    assert found.group.tolist() == [-1] * 3


def test_equal_scores_in_a_group_share_evenly() -> None:
    features = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.6], [0.1, 0.8]])
    found = quality_weights(features, np.ones(4))
    np.testing.assert_allclose(found.weights, [0.25, 0.25, 0.5, 0], atol=1e-12)


def test_weights_sum_to_one_and_are_not_negative() -> None:
    rng = np.random.default_rng(0)
    for trial in range(20):
        features = rng.uniform(0, 2, (3 + trial % 8, 4))
        features[rng.random(len(features)) < 0.2] = NAN
        found = quality_weights(features, rng.integers(1, 50, len(features)).astype(float), covariance="diag")
        assert found.weights.sum() == pytest.approx(1.0)
        assert found.weights.min() >= 0


def test_shares_without_any_size() -> None:
    np.testing.assert_allclose(shares(np.zeros(4)), 0.25)


def test_alpha_schedule() -> None:
    np.testing.assert_allclose(alpha_by_group(10), np.arange(10) / 9)
    np.testing.assert_allclose(alpha_by_group(3, 0.5, 2.0, 0.25), [0.25, 0.375, 0.75])
    np.testing.assert_allclose(alpha_by_group(1), [1.0])
    np.testing.assert_allclose(alpha_by_group(4, 0.0, 3.0, 0.0), 0.0)


def test_layer_weights_by_hand() -> None:
    table = layer_weights(np.array([0.5, 0.5, 0.0]), np.array([10.0, 30.0, 60.0]), alpha_by_group(10))
    np.testing.assert_allclose(table[0], [0.1, 0.3, 0.6])
    np.testing.assert_allclose(table[1], [0.144444, 0.322222, 0.533333], atol=1e-6)
    np.testing.assert_allclose(table[5], [0.322222, 0.411111, 0.266667], atol=1e-6)
    np.testing.assert_allclose(table[9], [0.5, 0.5, 0.0])
    np.testing.assert_allclose(layer_weights(np.zeros(2), np.array([1.0, 3.0]), np.ones(1)), [[0.25, 0.75]])


def layered(value: float) -> dict[str, Tensor]:
    return {f"{stage}.w": torch.tensor([value], dtype=torch.float64) for stage in STAGES}


ALPHA = {f"{stage}.w": g / 9 for g, stage in enumerate(STAGES)}


def test_aggregate_by_hand() -> None:
    parts = zip([0.5, 0.5, 0.0], [10.0, 30.0, 60.0], [layered(1), layered(2), layered(3)], strict=True)
    mean = aggregate_layerwise(parts, ALPHA)
    assert mean is not None
    assert [float(mean[f"{s}.w"]) for s in ("inc", "up1", "outc")] == pytest.approx([2.5, 1.944444, 1.5], abs=1e-6)


def test_aggregate_equals_the_table_of_weights() -> None:
    rng = torch.Generator().manual_seed(0)
    states = [{name: torch.randn(3, 2, generator=rng, dtype=torch.float64) for name in ALPHA} for _ in range(4)]
    u, n = np.array([0.1, 0.0, 0.6, 0.3]), np.array([5.0, 8.0, 2.0, 9.0])
    mean = aggregate_layerwise(zip(u.tolist(), n.tolist(), states, strict=True), ALPHA)
    table = layer_weights(u, n, alpha_by_group(10))
    assert mean is not None
    for g, name in enumerate(ALPHA):
        naive = sum(float(w) * state[name] for w, state in zip(table[g], states, strict=True))
        torch.testing.assert_close(mean[name], naive, rtol=0, atol=1e-12)


def test_aggregate_edges() -> None:
    by_size = aggregate_layerwise([(0.0, 1.0, layered(1)), (0.0, 3.0, layered(2))], ALPHA)
    assert by_size is not None and {float(v) for v in by_size.values()} == {1.75}
    same = aggregate_layerwise([(0.3, 1.0, layered(4)), (0.1, 3.0, layered(4))], ALPHA)
    assert same is not None and all(float(v) == pytest.approx(4) for v in same.values())
    assert aggregate_layerwise([], ALPHA) is None
    counted = [(0.0, 1.0, {"inc.n": torch.tensor(9)}), (1.0, 1.0, {"inc.n": torch.tensor(4)})]
    merged = aggregate_layerwise(counted, {"inc.n": 0.5})
    assert merged is not None and int(merged["inc.n"]) == 9


def test_a_site_of_no_weight_cannot_spoil_the_sum() -> None:
    broken = {name: torch.full_like(value, NAN) for name, value in layered(1).items()}
    mean = aggregate_layerwise([(1.0, 2.0, layered(1)), (0.0, 0.0, broken)], ALPHA)
    assert mean is not None and all(float(v) == 1.0 for v in mean.values())


def test_feature_rows_fill_what_is_missing() -> None:
    sent = {"a": {"loss_in_0": 1.0, "loss_out_0": 2.0, "loss_in_1": 3.0, "train_loss": 9.0}, "b": {}}
    rows = feature_rows(sent)
    np.testing.assert_equal(rows, {"a": [1.0, 2.0, 3.0, NAN], "b": [NAN] * 4})
    assert len(feature_rows({"a": {}})["a"]) == 2


def make_rule(bench: SimpleNamespace, sizes: dict[str, int], groups: tuple[str, ...] = STAGES) -> FedA3I:
    rule = FedA3I(FedA3IParams(warmup_rounds=1))
    return bench.bound(rule, layered(0.0), list(sizes.items()), groups)  # type: ignore[no-any-return]


def replies(bench: SimpleNamespace, features: np.ndarray, n: int = 10) -> list[object]:
    rows = enumerate(features)
    return [bench.update(f"s{k}", k, n, layered(k), loss_in_0=float(f[0]), loss_out_0=float(f[1])) for k, f in rows]


def test_features_are_asked_for_in_one_round_only(bench: SimpleNamespace) -> None:
    rule = make_rule(bench, {f"s{k}": 10 for k in range(5)})
    assert [rule.payload(r, "s0")[1]["estimate_noise"] for r in (1, 2, 3)] == [False, True, False]
    rule.aggregate(2, layered(0), iter(replies(bench, HAND)))
    assert rule.payload(2, "s0")[1]["estimate_noise"] is False


def test_rule_estimates_then_mixes_by_depth(bench: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    rule = make_rule(bench, {f"s{k}": 10 for k in range(5)})
    plain = rule.aggregate(1, layered(0), iter(replies(bench, HAND)))
    assert all(float(v) == pytest.approx(2.0) for v in plain.values())
    with caplog.at_level(logging.WARNING):
        new = rule.aggregate(2, layered(0), iter(replies(bench, HAND)))
    assert float(new["inc.w"]) == pytest.approx(2.0)
    assert float(new["outc.w"]) == pytest.approx(1 / 6 + 2 / 3 + 3 / 2)
    assert rule.state.group == {"s0": 1, "s1": 1, "s2": 1, "s3": 0, "s4": 0}
    assert rule.notes["believed_noisy"] == ["s0", "s1", "s4"]
    assert rule.notes["groups"] == {"expansion": 3, "shrinkage": 2, "none": 0}
    assert rule.notes["largest_weight"] == pytest.approx(0.5)
    assert "do not lean on so few" in caplog.text


def test_absent_site_counts_by_its_size_for_good(bench: SimpleNamespace) -> None:
    rule = make_rule(bench, {"s0": 10, "s1": 10, "s2": 10, "s3": 10, "s4": 10, "s5": 50})
    rule.aggregate(2, layered(0), iter(replies(bench, HAND)))
    assert rule.state.quality["s5"] == pytest.approx(0.5)
    assert rule.state.quality["s3"] == pytest.approx(0.25)
    later = [bench.update("s3", 3, 10, layered(1)), bench.update("s5", 5, 50, layered(4))]
    new = rule.aggregate(3, layered(0), iter(later))
    assert float(new["outc.w"]) == pytest.approx(3.0)
    assert float(new["inc.w"]) == pytest.approx(3.5)


def test_newcomer_counts_by_its_size(bench: SimpleNamespace) -> None:
    rule = make_rule(bench, {f"s{k}": 10 for k in range(5)})
    rule.aggregate(2, layered(0), iter(replies(bench, HAND)))
    new = rule.aggregate(
        3, layered(0), iter([bench.update("s3", 3, 10, layered(0)), bench.update("new", 9, 25, layered(1))])
    )
    assert float(new["outc.w"]) == pytest.approx(0.5)


def test_nobody_replied(bench: SimpleNamespace) -> None:
    rule = make_rule(bench, {"s0": 10, "s1": 10})
    kept = layered(7)
    assert rule.aggregate(2, kept, iter([])) is kept


def test_model_without_depth_groups_fails_in_the_first_round(bench: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="depth"):
        make_rule(bench, {"s0": 10}, groups=()).aggregate(1, layered(0), iter([]))


@pytest.mark.parametrize(
    "wrong", [{"alpha_bias": -0.1}, {"alpha_weight": 1.2}, {"expansion_mass": 2.0}, {"covariance": "no"}]
)
def test_values_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="outside its range"):
        FedA3IParams(**wrong)  # type: ignore[arg-type]
