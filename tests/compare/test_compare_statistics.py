"""Statistics of a comparison, against numbers worked by hand, tables in print and a count of all sign flips."""

from __future__ import annotations

import itertools
import math

import pytest

from fedmed.compare.statistics import (
    best_and_tied,
    compare,
    holm,
    matched_pairs,
    mean_sd,
    outcome,
    paired,
    signed_rank,
    tally,
)

NAN = math.nan
# Quantile 0.975 of Student's t with 1 to 4 degrees of freedom, from a printed table.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def all_sign_flips(differences: list[float]) -> float:
    """Two-sided p from the rank sums of all 2^n sign patterns, equal ranks shared."""
    sizes = [abs(d) for d in differences]
    ranks = [sum(b < a for b in sizes) + (sum(b == a for b in sizes) + 1) / 2 for a in sizes]
    seen = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    sums = [sum(itertools.compress(ranks, flips)) for flips in itertools.product((0, 1), repeat=len(ranks))]
    tails = sum(s >= seen for s in sums), sum(s <= seen for s in sums)
    return min(1.0, 2 * min(tails) / len(sums))


def test_mean_and_deviation() -> None:
    assert mean_sd([1.0, 2.0, NAN, 6.0]) == pytest.approx((3.0, math.sqrt(7.0)))  # (4 + 1 + 9) / 2
    middle, deviation = mean_sd([4.0])
    assert middle == 4.0 and math.isnan(deviation)
    assert all(math.isnan(v) for v in mean_sd([NAN]))


def test_interval_of_five_pairs() -> None:
    found = paired(by_seed(2.0, 4.0, 6.0, 8.0, 10.0), by_seed(1.0, 2.0, 3.0, 4.0, 5.0))  # d = 1, 2, 3, 4, 5
    half = T[4] * math.sqrt(2.5) / math.sqrt(5)
    assert found.mean == 3.0 and found.sd == pytest.approx(math.sqrt(2.5))
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert (found.seeds, found.missing) == (5, 0)


def test_interval_of_two_pairs_and_undefined_seeds() -> None:
    found = paired(by_seed(0.0, 3.0, NAN, 5.0), {0: 0.0, 1: 1.0, 2: 1.0})  # d = 0, 2; seed 2 undefined, seed 3 missing
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - T[1], 1 + T[1]), abs=1e-3)
    assert (found.seeds, found.missing) == (2, 2)


def test_one_seed_and_none_have_no_interval() -> None:
    one = paired({3: 0.5}, {3: 0.25})
    assert one.mean == 0.25 and one.seeds == 1
    assert math.isnan(one.sd) and math.isnan(one.low) and math.isnan(one.high)
    none = paired({}, {0: 1.0})
    assert math.isnan(none.mean) and (none.seeds, none.missing) == (0, 1)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    found = paired(by_seed(0.5, 0.75), by_seed(0.25, 0.5))
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2 / 32),  # only all plus and all minus are as far out
        ([-1.0, 2.0, 3.0, 4.0], 4 / 16),  # W- = 1: {} and {1} on either side
        ([1.0, 2.0, 3.0], 2 / 8),  # what three seeds can show at most
        ([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2 / 32),  # zeros are dropped
        ([1.0, 1.0, 1.0, 1.0], 2 / 16),  # shared ranks
        ([1.0, 0.0], 1.0),
    ],
)
def test_signed_rank_by_hand(differences: list[float], p: float) -> None:
    assert signed_rank(differences) == pytest.approx(p)


@pytest.mark.parametrize(
    "differences", [[3.0, 1.0, -1.0, 2.0, 2.0, 5.0], [0.3, -0.1, 0.2, 0.7, 0.5, -0.4, 0.6], [-2.0, -2.0, 1.0, 1.0]]
)
def test_signed_rank_counts_sign_flips(differences: list[float]) -> None:
    assert signed_rank(differences) == pytest.approx(all_sign_flips(differences))


def test_signed_rank_sees_through_rounding() -> None:
    """0.3 - 0.2 and 0.2 - 0.1 differ in the last bit only: they share a rank, so W- = 1.5 and three of eight patterns reach it."""
    assert 0 < 0.2 - 0.1 - (0.3 - 0.2) < 1e-15
    assert signed_rank([0.2 - 0.3, 0.2 - 0.1, 0.5]) == pytest.approx(2 * 3 / 8)


def test_signed_rank_of_many_is_near_normal() -> None:
    """60 pairs with ranks 1..60, the even ones negative: W+ = 900, mean 915, variance 60 * 61 * 121 / 24."""
    differences = [float(i if i % 2 else -i) for i in range(1, 61)]
    z = (900 - 915) / math.sqrt(60 * 61 * 121 / 24)
    assert signed_rank(differences) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("differences", [[], [1.0], [0.0, 0.0, 0.0], [1e-13, -1e-13]])
def test_signed_rank_without_anything_to_rank(differences: list[float]) -> None:
    assert signed_rank(differences) is None


def test_tally_counts_in_the_direction_of_the_metric() -> None:
    differences = [0.5, -0.25, 0.0, 1e-13, 0.125]
    assert tally(differences) == (2, 2, 1)
    assert tally(differences, smaller_is_better=True) == (1, 2, 2)


def test_pairs_are_seed_and_site_where_both_are_scored() -> None:
    arm = {0: {"a": 0.5, "b": 0.75, "c": NAN}, 1: {"a": 1.0}}
    base = {0: {"a": 0.25, "c": 0.5}, 1: {"a": 0.25}, 2: {"a": 0.0}}
    assert matched_pairs({}, {}, arm, base) == ([0.25, 0.75], "seed x site")
    assert matched_pairs(by_seed(1.0, 2.0, 3.0), by_seed(0.5, NAN), arm, {}) == ([0.5], "seed")


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 * .01; 2 * .03; .04 may not fall below
    assert holm([0.04, None, 0.02]) == [0.04, None, 0.04]
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_best_and_tied() -> None:
    values = {
        "good": by_seed(0.6, 0.7, 0.8),
        "near": by_seed(0.5, 0.75, 0.7),  # d = -.1, .05, -.1: half width 4.303 * .0866 / sqrt(3) = .215
        "far": by_seed(0.3, 0.39, 0.51),  # d = -.3, -.31, -.29: half width .025
        "none": by_seed(NAN, NAN, NAN),
    }
    assert best_and_tied(values) == ({"good"}, {"near"})
    assert best_and_tied(values, smaller_is_better=True) == ({"far"}, set())
    assert best_and_tied({"none": values["none"]}) == (set(), set())


def test_one_seed_ties_nobody_and_equal_means_are_both_best() -> None:
    assert best_and_tied({"a": {0: 0.5}, "b": {0: 0.499}}) == ({"a"}, set())
    assert best_and_tied({"a": by_seed(0.5, 0.7), "b": by_seed(0.7, 0.5), "c": by_seed(0.1, 0.1)})[0] == {"a", "b"}


def test_outcome_of_an_interval() -> None:
    assert [outcome(0.1, 0.2), outcome(-0.1, 0.2), outcome(-0.2, -0.1), outcome(0.0, 0.2)] == [1, 0, -1, 0]
    assert outcome(0.1, 0.2, smaller_is_better=True) == -1
    assert outcome(None, None) == outcome(NAN, NAN) == 0


def test_compare_arms_of_a_setting() -> None:
    values = {"base": by_seed(0.25, 0.5), "one": by_seed(0.5, 0.75), "two": by_seed(0.25, NAN)}
    sites = {
        "base": {0: {"a": 0.1, "b": 0.2, "c": 0.3}, 1: {"a": 0.4, "b": 0.5}},
        "one": {0: {"a": 0.2, "b": 0.4, "c": 0.6}, 1: {"a": 0.8, "b": 1.0}},
        "two": {0: {"a": 0.1, "b": 0.2, "c": 0.2}},
    }
    found = compare(values, sites, "base")
    assert found["base"]["difference"] is None and found["base"]["mean"] == 0.375
    one, two = found["one"]["difference"], found["two"]["difference"]
    assert found["one"]["best"] and not found["base"]["best"] and not found["base"]["tied"]
    assert (one["mean"], one["low"], one["high"], one["seeds"], one["missing"]) == (0.25, 0.25, 0.25, 2, 0)
    assert (one["p"], one["pairs"], one["per"]) == (pytest.approx(2 / 32), 5, "seed x site")
    assert (one["wins"], one["ties"], one["losses"]) == (5, 0, 0)
    assert (two["seeds"], two["missing"], two["pairs"]) == (1, 1, 3) and math.isnan(two["low"])
    assert (two["wins"], two["ties"], two["losses"]) == (0, 2, 1) and two["p"] == pytest.approx(1.0)
    assert one["p_holm"] == pytest.approx(4 / 32) and two["p_holm"] == pytest.approx(1.0)
    smaller = compare(values, sites, "base", smaller_is_better=True)["one"]
    assert not smaller["best"] and (smaller["difference"]["wins"], smaller["difference"]["losses"]) == (0, 5)
