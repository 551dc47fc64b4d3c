"""The weights between modalities: hand cases, and every division driven to zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedmed.losses.balance import (
    BalanceParams,
    balanced_terms,
    frequency_weights,
    next_beta,
    next_eta,
    round_preference,
    task_gate,
    task_lag,
    update_balance,
)

NAN, INF = float("nan"), float("inf")


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


FOUR = row(0.1, 0.2, 0.3, 0.2)
ALL = torch.ones(1, 4, dtype=torch.float64)


def test_gate_by_hand() -> None:
    lag = task_lag(FOUR[None], ALL)
    torch.testing.assert_close(lag, row(-0.5, 0.0, 0.5, 0.0), rtol=0, atol=1e-12)
    assert task_gate(row(-0.5, 0.0, 0.5, 0.0)).tolist() == [0, 0, 1, 0]


def test_lag_does_not_see_the_scale_of_an_image() -> None:
    both = torch.stack([FOUR, FOUR * 1000])
    torch.testing.assert_close(task_lag(both, ALL.expand(2, 4)), 2 * task_lag(FOUR[None], ALL))


@pytest.mark.parametrize(
    ("distance", "present"),
    [
        ([0.0, 0.3, 0.3, 0.3], [1, 0, 0, 0]),  # one modality: it is the teacher
        ([0.3, 0.3, 0.3, 0.3], [0, 0, 0, 0]),  # none
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 0]),  # all agree with the teacher
        ([0.1, NAN, 0.3, 0.2], [1, 1, 1, 1]),
        ([0.1, INF, 0.3, 0.2], [1, 1, 1, 1]),
    ],
)
def test_an_image_that_cannot_compare_closes_no_gate(distance: list[float], present: list[int]) -> None:
    alone = task_lag(row(*distance)[None], torch.tensor([present]))
    assert alone.tolist() == [0, 0, 0, 0] and task_gate(alone).tolist() == [0, 0, 0, 0]
    together = task_lag(torch.stack([FOUR, row(*distance)]), torch.tensor([[1, 1, 1, 1], present]))
    torch.testing.assert_close(together, task_lag(FOUR[None], ALL))


def test_an_absent_modality_is_not_read() -> None:
    distance, present = row(0.1, NAN, 0.3, 0.2)[None], torch.tensor([[1, 0, 1, 1]])
    torch.testing.assert_close(task_lag(distance, present), row(-0.5, 0.0, 0.5, 0.0))
    terms = balanced_terms(distance, distance, distance, present, *(torch.ones(4, dtype=torch.float64),) * 3)
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(dict.fromkeys(terms, 0.6))


def test_frequency_weights_by_hand() -> None:
    found = frequency_weights(219, torch.tensor([43, 219, 0]))
    torch.testing.assert_close(found, row(219 / 43, 1.0, 0.0))
    assert float(found[0]) == pytest.approx(5.0930, abs=1e-4)
    assert frequency_weights(0, torch.tensor([3, 0])).tolist() == [0, 0]


def test_terms_by_hand() -> None:
    """Two images, two modalities; the second image lacks the second one."""
    single, pixel, semantic = torch.tensor([[[1.0, 2.0], [3.0, 9.0]], [[1, 1], [1, 9]], [[4, 5], [6, 9]]])
    present = torch.tensor([[1, 1], [1, 0]])
    terms = balanced_terms(
        single, pixel, semantic, present, torch.tensor([0.0, 1]), torch.tensor([0.5, 2]), torch.tensor([1.0, 3])
    )
    assert {k: float(v) for k, v in terms.items()} == {"single": 2 * 2 * 3, "pixel": 0.5 * 2 + 6, "semantic": 15}


def test_beta_by_hand() -> None:
    preference = round_preference(FOUR)
    torch.testing.assert_close(preference, row(0.5, 0.0, -0.5, 0.0), rtol=0, atol=1e-12)
    beta, eta = update_balance(torch.ones(4, dtype=torch.float64), 0.01, 0, FOUR, BalanceParams())
    assert eta == pytest.approx(0.015)
    torch.testing.assert_close(beta, row(0.992486, 0.999986, 1.007486, 0.999986), rtol=0, atol=5e-7)


@pytest.mark.parametrize("modalities", [1, 3, 7])
def test_the_norm_of_beta_is_the_root_of_the_number_of_modalities(modalities: int) -> None:
    distance = torch.rand(modalities, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    beta = next_beta(torch.ones(modalities, dtype=torch.float64), round_preference(distance), 0.5)
    assert float(beta.norm()) == pytest.approx(math.sqrt(modalities))


def test_beta_is_clamped() -> None:
    before = torch.ones(2, dtype=torch.float64)
    found = next_beta(before, row(1.0, -1.0), 100.0)
    torch.testing.assert_close(found[1] / found[0], torch.tensor(40.0, dtype=torch.float64))


def test_eta_grows_in_the_first_update_and_every_hundredth() -> None:
    eta, seen = 0.01, {}
    for e in range(201):
        eta = seen[e] = next_eta(eta, e)
    assert [seen[e] for e in (0, 99, 100, 199, 200)] == pytest.approx([0.015, 0.015, 0.0225, 0.0225, 0.03375])


def test_a_modality_that_nobody_has_changes_by_the_norm_alone() -> None:
    distance = row(0.1, NAN, 0.3)
    assert round_preference(distance).tolist() == pytest.approx([0.5, 0.0, -0.5])
    beta, _ = update_balance(torch.ones(3, dtype=torch.float64), 0.01, 0, distance, BalanceParams())
    raw = row(1 - 0.0075, 1.0, 1.0075)
    torch.testing.assert_close(beta, math.sqrt(3) * raw / raw.norm())


def test_without_any_distance_nothing_moves() -> None:
    before = row(0.5, 1.5)
    beta, eta = update_balance(before, 0.01, 0, row(NAN, NAN), BalanceParams())
    assert beta is before and eta == 0.01


def test_no_distance_at_all_between_students_and_teacher() -> None:
    """Mean distance 0: no preference, η moves on."""
    assert round_preference(row(0.0, 0.0)).tolist() == [0, 0]
    beta, eta = update_balance(torch.ones(2, dtype=torch.float64), 0.01, 0, row(0.0, 0.0), BalanceParams())
    torch.testing.assert_close(beta, torch.ones(2, dtype=torch.float64))
    assert eta == pytest.approx(0.015)


def test_equal_distances_keep_beta() -> None:
    beta, _ = update_balance(torch.ones(3, dtype=torch.float64), 0.01, 0, row(0.2, 0.2, 0.2), BalanceParams())
    torch.testing.assert_close(beta, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "wrong", [{"eta": -1}, {"eta_factor": 0}, {"eta_period": 0}, {"beta_min": 0}, {"beta_max": 0.01}, {"eta": NAN}]
)
def test_parameters_outside_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="eta_period >= 1"):
        BalanceParams(**wrong)  # type: ignore[arg-type]
