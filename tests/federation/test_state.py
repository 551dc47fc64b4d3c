"""Algebra on states: hand numbers, invariances, dtypes, edges, and a naive twin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from fedmed.federation.state import (
    RunningMean,
    State,
    clone_state,
    first_non_finite,
    mix,
    num_bytes,
    weighted_mean,
)


def state(*values: float, counter: int = 0) -> State:
    return {"w": torch.tensor(values), "n": torch.tensor(counter)}


def naive_mean(pairs: list[tuple[float, State]]) -> State:
    """Everything at once, in float64."""
    out: State = {}
    for name, first in pairs[0][1].items():
        stack = torch.stack([s[name] for _, s in pairs])
        weights = torch.tensor([w for w, _ in pairs], dtype=torch.float64)
        if not first.is_floating_point():
            out[name] = stack.amax(dim=0)
        else:
            shaped = weights.reshape(-1, *[1] * first.ndim)
            out[name] = ((stack.double() * shaped).sum(dim=0) / weights.sum()).to(first.dtype)
    return out


def many(dtype: torch.dtype, count: int = 5) -> list[tuple[float, State]]:
    rng = torch.Generator().manual_seed(3)

    def one() -> State:
        floats = {f"layer{i}": torch.randn(3, i + 1, generator=rng).to(dtype) for i in range(4)}
        return {**floats, "scalar": torch.randn((), generator=rng).to(dtype), "count": torch.tensor([3, 9])}

    return [(float(k + 1), one()) for k in range(count)]


def test_mean_by_hand() -> None:
    mean = weighted_mean([(1, state(1.0, 2.0, counter=7)), (3, state(3.0, 4.0, counter=5))])
    assert mean is not None
    assert mean["w"].tolist() == [2.5, 3.5]
    assert mean["n"].item() == 7 and mean["n"].dtype == torch.int64 and mean["n"].shape == ()


def test_float64_is_summed_in_float64() -> None:
    values = [1.0, 1.0 + 1e-12]
    mean = weighted_mean((1, {"w": torch.tensor(v, dtype=torch.float64)}) for v in values)
    assert mean is not None and mean["w"].item() == pytest.approx(1.0 + 5e-13, abs=1e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_in_is_dtype_out_and_sums_are_wide(dtype: torch.dtype) -> None:
    # 3000 · 60 overflows float16, the sum must not.
    mean = weighted_mean((3000, {"w": torch.full((2,), 60.0, dtype=dtype)}) for _ in range(2))
    assert mean is not None and mean["w"].dtype == dtype and mean["w"].tolist() == [60.0, 60.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_take_the_maximum(dtype: torch.dtype) -> None:
    values = [torch.tensor([0, 1], dtype=dtype), torch.tensor([1, 0], dtype=dtype)]
    mean = weighted_mean((1, {"n": v}) for v in values)
    assert mean is not None and mean["n"].dtype == dtype and mean["n"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_same_as_naive_twin(dtype: torch.dtype) -> None:
    pairs = many(dtype)
    mean, twin = weighted_mean(pairs), naive_mean(pairs)
    assert mean is not None and list(mean) == list(twin)
    for name, value in twin.items():
        torch.testing.assert_close(mean[name], value)


def test_order_does_not_matter() -> None:
    # Powers of two: every sum is exact, so the mean must agree to the bit.
    pairs = [(2.0**k, state(2.0**-k, 3.0 * 2.0**k, counter=k)) for k in range(4)]
    results = [weighted_mean(p) for p in itertools.permutations(pairs)]
    for result in results[1:]:
        assert result is not None and results[0] is not None
        assert all(torch.equal(result[n], results[0][n]) for n in result)


def test_weight_scale_does_not_matter_and_identical_sites_give_the_site_back() -> None:
    pairs = many(torch.float32)
    plain, scaled = weighted_mean(pairs), weighted_mean((w * 1024, s) for w, s in pairs)
    same = weighted_mean((w, pairs[0][1]) for w, _ in pairs)
    assert plain is not None and scaled is not None and same is not None
    for name in plain:
        assert torch.equal(plain[name], scaled[name])
        torch.testing.assert_close(same[name], pairs[0][1][name])


def test_weight_zero_is_never_added() -> None:
    nan = {"w": torch.tensor([math.nan, math.inf]), "n": torch.tensor(99)}
    for pairs in ([(0, nan), (2, state(1.0, 2.0, counter=4))], [(2, state(1.0, 2.0, counter=4)), (0, nan)]):
        mean = weighted_mean(pairs)
        assert mean is not None and mean["w"].tolist() == [1.0, 2.0] and mean["n"].item() == 4


def test_nothing_to_average() -> None:
    assert weighted_mean([]) is None
    assert weighted_mean([(0, state(1.0))]) is None
    mean = RunningMean()
    assert mean.empty and mean.total("w") == 0.0 and mean.result() is None


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="finite weight >= 0"):
        RunningMean().add(state(1.0), weight)
    with pytest.raises(ValueError, match="for w"):
        RunningMean().add(state(1.0), {"w": weight, "n": 1.0})


def test_weights_by_entry() -> None:
    mean = RunningMean()
    mean.add({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, {"a": 1.0, "b": 0.0})
    mean.add({"a": torch.tensor(5.0), "b": torch.tensor(5.0)}, {"a": 3.0, "b": 2.0})
    assert (mean.total("a"), mean.total("b")) == (4.0, 2.0)
    result = mean.result()
    assert result is not None and result["a"].item() == 4.0 and result["b"].item() == 5.0


def test_sites_may_leave_entries_out() -> None:
    mean = weighted_mean([(1, {"a": torch.tensor(1.0)}), (1, {"a": torch.tensor(3.0), "b": torch.tensor(5.0)})])
    assert mean is not None and mean["a"].item() == 2.0 and mean["b"].item() == 5.0


def test_inputs_are_left_alone_and_not_given_away() -> None:
    first = {"w": torch.ones(2), "n": torch.tensor(1), "d": torch.ones(1, dtype=torch.float64)}
    kept = clone_state(first)
    mean = weighted_mean([(1, first)])
    weighted_mean([(2, first), (1, kept)])
    assert mean is not None
    for name in first:
        assert torch.equal(first[name], kept[name])
        mean[name].add_(1)
        assert torch.equal(first[name], kept[name])


def test_states_are_read_once_in_order() -> None:
    seen = []

    def source() -> Iterator[tuple[float, State]]:
        for k in range(3):
            seen.append(k)
            yield 1.0, state(float(k))

    mean = weighted_mean(source())
    assert seen == [0, 1, 2] and mean is not None and mean["w"].item() == 1.0


def test_mix_by_hand() -> None:
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(4.0), "n": torch.tensor(3)}
    b = {"x": torch.tensor([3.0, 6.0]), "y": a["y"], "n": torch.tensor(8)}
    out = mix(a, b, {"x": 0.25, "y": 0.5, "n": 0.0})
    assert out["x"].tolist() == [2.5, 5.0] and out["y"].item() == 4.0 and out["n"].item() == 8
    assert mix(a, b, {"x": 1.0, "y": 1.0})["x"].tolist() == [1.0, 2.0]
    assert mix(a, b, {"x": 0.0, "y": 0.0})["x"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_entry_is_named(value: float) -> None:
    assert first_non_finite({"n": torch.tensor(3), "a": torch.ones(2), "b": torch.tensor([1.0, value])}) == "b"


def test_finite_entries_whose_sum_overflows_are_finite() -> None:
    assert first_non_finite({"a": torch.full((3,), 3e38), "e": torch.empty(0), "n": torch.tensor(3)}) is None
    assert first_non_finite({"a": torch.tensor([math.inf, -math.inf])}) == "a"


def test_copies_and_bytes() -> None:
    original = {"w": torch.ones(2, 3), "n": torch.tensor(1)}
    copy = clone_state(original)
    copy["w"].zero_()
    assert original["w"].sum().item() == 6.0
    assert num_bytes(original) == 6 * 4 + 8 and num_bytes({}) == 0
