"""The adaptive element-wise aggregation: numbers by hand, the rule against a loop written out, when it stops, what it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.adaptive_merge import (
    Learnt,
    initial_weights,
    learn,
    learn_in_model,
    mean_weight,
    merge_due,
    merged_values,
    settled,
    stepped_weights,
    temporary_model,
)
from fedmed.federation.state import State, clone_state, copy_state

F64 = torch.float64


def state(*values: float, name: str = "w") -> State:
    return {name: torch.tensor(values, dtype=F64)}


def random_state(*shapes: tuple[int, ...], seed: int) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=rng, dtype=F64) for i, shape in enumerate(shapes)}


# ---------------------------------------------------------------------- equations


@pytest.mark.parametrize(("gradient", "weight", "merged"), [(0.2, 0.6, 2.2), (-0.2, 1.0, 3.0)])
def test_canonical_by_hand(gradient: float, weight: float, merged: float) -> None:
    own, received, start = state(1.0), state(3.0), initial_weights(state(3.0), "ones")
    assert merged_values(own, received, start)["w"].tolist() == [3.0]
    stepped = stepped_weights(start, state(gradient), own, received, 1.0)
    torch.testing.assert_close(stepped, state(weight))
    torch.testing.assert_close(merged_values(own, received, stepped), state(merged))


@pytest.mark.parametrize(("gradient", "released_v", "merged"), [(0.2, 1.0, 1.0), (-0.2, 0.6, 1.8)])
def test_released_by_hand(gradient: float, released_v: float, merged: float) -> None:
    own, received, start = state(1.0), state(3.0), initial_weights(state(3.0), "zeros")
    assert merged_values(own, received, start)["w"].tolist() == [1.0]
    stepped = stepped_weights(start, state(gradient), own, received, 1.0)
    torch.testing.assert_close(1.0 - stepped["w"], torch.tensor([released_v], dtype=F64))
    torch.testing.assert_close(merged_values(own, received, stepped), state(merged))


def test_the_step_goes_down_the_slope_of_the_loss_in_w() -> None:
    """g·(G − θ_i) is ∂loss/∂W: autograd through θ̂ says the same."""
    own, received = random_state((3, 2), (4,), seed=1), random_state((3, 2), (4,), seed=2)
    weights = {name: torch.full_like(v, 0.5).requires_grad_() for name, v in own.items()}
    merged = merged_values(own, received, weights)
    merged = {name: value.requires_grad_() for name, value in merged.items()}
    loss = sum(value.square().sum() + value.prod() for value in merged.values())
    slopes = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    found = torch.autograd.grad(loss, list(merged.values()))
    gradients = dict(zip(merged, found, strict=True))
    with torch.no_grad():
        stepped = stepped_weights(weights, gradients, own, received, 1e-3)
        for (name, weight), slope in zip(weights.items(), slopes, strict=True):
            torch.testing.assert_close(stepped[name], weight - 1e-3 * slope)
    torch.autograd.gradcheck(lambda w: merged_values(own, received, {"p1": w})["p1"], weights["p1"])


def test_the_received_value_is_exact_at_w_one_and_the_own_one_at_zero() -> None:
    own, received = random_state((500,), seed=3), random_state((500,), seed=4)
    assert torch.equal(merged_values(own, received, initial_weights(received, "ones"))["p0"], received["p0"])
    assert torch.equal(merged_values(own, received, initial_weights(received, "zeros"))["p0"], own["p0"])
    rounded = own["p0"] + (received["p0"] - own["p0"])
    assert not torch.equal(rounded, received["p0"])  # else this test says nothing


def test_weights_stay_within_their_range_and_nothing_is_written_into_the_inputs() -> None:
    own, received = random_state((50,), seed=5), random_state((50,), seed=6)
    start = initial_weights(received, "ones")
    before = clone_state(start)
    stepped = stepped_weights(start, random_state((50,), seed=7), own, received, 5.0)["p0"]
    assert float(stepped.min()) == 0.0 and float(stepped.max()) == 1.0 and 0.0 < float(stepped.mean()) < 1.0
    torch.testing.assert_close(start, before, rtol=0, atol=0)


def test_gradients_that_are_not_finite_count_as_zero() -> None:
    own, received = state(0.0, 0.0, 0.0, 0.0), state(1.0, 1.0, 1.0, 1.0)
    stepped = stepped_weights(state(0.5, 0.5, 0.5, 0.5), state(math.nan, math.inf, -math.inf, 0.25), own, received, 1.0)
    assert stepped["w"].tolist() == [0.5, 0.5, 0.5, 0.25]


def test_a_parameter_without_gradient_keeps_its_weight() -> None:
    weights = {**state(0.5), **state(0.3, name="unused")}
    own, received = ({**state(v), **state(v, name="unused")} for v in (0.0, 1.0))
    stepped = stepped_weights(weights, state(0.1), own, received, 1.0)
    torch.testing.assert_close(stepped, {**state(0.4), **state(0.3, name="unused")})


def test_mean_weight() -> None:
    assert mean_weight({"a": torch.ones(3), "b": torch.zeros(1)}) == 0.75
    assert mean_weight({}) == 1.0


def test_when_a_merge_is_due() -> None:
    own, other = {**state(1.0, 2.0), **state(0.0, name="b")}, {**state(2.0, 1.0), **state(0.0, name="b")}
    assert merge_due(6, 5, own, other) and not merge_due(5, 5, own, other)  # the first sums agree, the values do not
    assert not merge_due(6, 5, own, own)
    assert merge_due(6, 5, own, {**own, **state(1e-300, name="b")})


# ---------------------------------------------------------------------- when it stops


def test_settled_by_hand() -> None:
    assert not settled([1.0] * 10) and settled([1.0] * 11)
    assert settled([100.0, *[1.0] * 10])  # only the last 10 count
    assert not settled([1.0] * 10 + [3.0])
    alternating = [0.0, 0.2] * 6
    assert not settled(
        [value * 1.001 for value in alternating]
    )  # population form: exactly 0.1 at 0.2, 0.105 as a sample
    assert settled([value * 0.999 for value in alternating])
    assert not settled([math.nan] * 20)


class Course:
    """A gradient function with given losses, one a batch; counts its calls."""

    def __init__(self, losses: Iterable[float | None]) -> None:
        self.losses, self.calls = iter(losses), 0

    def __call__(self, batch: int, merged: State) -> tuple[Tensor, State] | None:
        self.calls += 1
        loss = next(self.losses)
        return None if loss is None else (torch.tensor(loss), state(0.01))


def learnt(losses: list[float | None], num_batches: int = 1, **wanted: Any) -> tuple[Learnt, int]:
    course = Course(losses)
    found = learn(state(0.0), state(1.0), state(1.0), course, lambda: range(num_batches), **wanted)
    return found, course.calls


def test_one_pass_or_until_the_losses_settle_or_the_limit() -> None:
    assert learnt([1.0] * 100)[1] == 1
    assert learnt([1.0] * 100, max_passes=50)[1] == 11
    falling = [10.0 - i if i < 9 else 1.0 for i in range(100)]
    assert learnt(falling, max_passes=50)[1] == 19  # the ten last are 1 for the first time (a spread of 0.3 one before)
    assert learnt([float(i) for i in range(100)], max_passes=50)[1] == 50


def test_the_loss_of_the_last_batch_of_a_pass_is_recorded() -> None:
    found, calls = learnt([9.0, 1.0, 9.0, 2.0, 9.0, 3.0], num_batches=2, max_passes=3)
    assert found.losses == [1.0, 2.0, 3.0] and calls == 6
    torch.testing.assert_close(found.weights, state(1.0 - 6 * 0.01))
    torch.testing.assert_close(found.merged, state(1.0 - 6 * 0.01))


def test_batches_that_say_nothing() -> None:
    found, _ = learnt([None, 5.0, None], num_batches=3)
    assert found.losses == [5.0]
    torch.testing.assert_close(found.weights, state(0.99))
    found, calls = learnt([None] * 9, num_batches=3, max_passes=3)
    assert found.losses == [] and calls == 3
    assert found.weights["w"].tolist() == [1.0] and found.merged["w"].tolist() == [1.0]
    assert learnt([], num_batches=0, max_passes=3)[0].losses == []


# ---------------------------------------------------------------------- with a model


class Toy(nn.Module):
    """Linear, BatchNorm, dropout, linear; `aside` is a parameter the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.aside = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.drop(torch.tanh(self.body(inputs))))


NAMES = ("head.weight", "head.bias", "aside")


@pytest.fixture
def toy() -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy().double()


def problem(toy: Toy) -> tuple[State, State, list[tuple[Tensor, Tensor]]]:
    """θ_i, G (what the model holds) and two batches."""
    received = clone_state({name: toy.state_dict()[name] for name in NAMES})
    rng = torch.Generator().manual_seed(1)
    own = {n: v + torch.randn(v.shape, generator=rng, dtype=F64) for n, v in received.items()}
    images, labels = torch.randn(10, 3, generator=rng, dtype=F64), torch.arange(10) % 2
    return own, received, list(zip(images.split(6), labels.split(6), strict=True))


def by_the_loop(toy: Toy, own: State, received: State, batches: Any, eta: float, passes: int) -> tuple[State, State]:
    """The rule step by step, as the canonical code does it: (W, θ̂)."""
    weights = {n: torch.ones_like(v) for n, v in own.items()}
    for _ in range(passes):
        for inputs, labels in batches:
            merged = {n: (own[n] + (received[n] - own[n]) * w).requires_grad_() for n, w in weights.items()}
            loss = F.cross_entropy(torch.func.functional_call(toy.eval(), merged, (inputs,)), labels)
            loss.backward()
            for n, w in weights.items():
                if merged[n].grad is not None:
                    weights[n] = torch.clip(w - eta * merged[n].grad * (received[n] - own[n]), 0, 1)
    return weights, {n: own[n] + (received[n] - own[n]) * w for n, w in weights.items()}


@pytest.mark.parametrize("max_passes", [1, 4])
def test_against_the_loop(toy: Toy, max_passes: int) -> None:
    own, received, batches = problem(toy)
    weights, merged = by_the_loop(toy, own, received, batches, 2.0, max_passes)
    found = learn_in_model(
        toy,
        own,
        received,
        initial_weights(received, "ones"),
        lambda batch: F.cross_entropy(toy(batch[0]), batch[1]),
        lambda: batches,
        2.0,
        max_passes,
    )
    torch.testing.assert_close(found.weights, weights)
    torch.testing.assert_close(found.merged, merged)
    assert len(found.losses) == max_passes and 0.0 < mean_weight(found.weights) < 1.0
    held = toy.state_dict()
    assert all(torch.equal(held[name], found.merged[name]) for name in NAMES)
    assert torch.equal(held["aside"], received["aside"])  # W = 1 and no gradient: the received value


def test_learning_lowers_the_loss(toy: Toy) -> None:
    own, received, batches = problem(toy)
    found = learn_in_model(
        toy, own, received, initial_weights(received, "ones"), lambda b: F.cross_entropy(toy(b[0]), b[1]),
        lambda: batches[:1], 1.0, 30,
    )  # fmt: skip
    assert found.losses[-1] < found.losses[0] - 0.01


def test_equal_models_and_no_step_size_change_nothing(toy: Toy) -> None:
    own, received, batches = problem(toy)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(toy(batch[0]), batch[1])

    for theirs, eta in ((own, 5.0), (received, 0.0)):
        start = {name: torch.full_like(v, 0.3) for name, v in own.items()}
        found = learn_in_model(toy, own, theirs, start, loss, lambda: batches, eta, 3)
        torch.testing.assert_close(found.weights, start, rtol=0, atol=0)
        if theirs is own:
            torch.testing.assert_close(found.merged, own)


def test_the_temporary_model_is_in_eval_mode_and_is_put_back(toy: Toy) -> None:
    own, received, batches = problem(toy)
    toy.body[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in toy.named_parameters()}
    before, random_numbers = clone_state(toy.state_dict()), torch.get_rng_state()
    toy.train()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        assert not toy.training and not toy.drop.training
        assert {name for name, p in toy.named_parameters() if p.requires_grad} == set(NAMES)
        return F.cross_entropy(toy(batch[0]), batch[1])

    with torch.no_grad():  # whatever the caller does
        learn_in_model(toy, own, received, initial_weights(received, "ones"), loss, lambda: batches)
    assert toy.training and toy.drop.training
    assert {name: p.requires_grad for name, p in toy.named_parameters()} == flags
    assert all(p.grad is None for p in toy.parameters())
    after = toy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in NAMES)
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_the_temporary_model_is_put_back_after_an_error(toy: Toy) -> None:
    toy.eval()
    with pytest.raises(RuntimeError, match="stop"), temporary_model(toy, ["head.bias"]):
        raise RuntimeError("stop")
    assert not toy.training and all(p.requires_grad for p in toy.parameters())


def test_a_model_with_nan_leaves_the_weights(toy: Toy) -> None:
    own, received, batches = problem(toy)
    copy_state({"body.0.bias": torch.full((4,), math.nan, dtype=F64)}, toy.state_dict())
    start = {name: torch.full_like(v, 0.5) for name, v in own.items()}
    found = learn_in_model(
        toy, own, received, start, lambda b: F.cross_entropy(toy(b[0]), b[1]), lambda: batches, 1.0, 3
    )
    torch.testing.assert_close(found.weights, start, rtol=0, atol=0)
    assert len(found.losses) == 3
