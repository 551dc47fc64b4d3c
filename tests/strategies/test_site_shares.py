"""Shares that a rule carries from round to round: restriction, newcomers, memory; and reading reported numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from fedmed.federation.messages import Update
from strategies.site_shares import normalise, remember, reported, restrict

HISTORY = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_reported_numbers(bench: SimpleNamespace) -> None:
    assert reported(bench.update("a", 0, 1, {}, loss=2), "loss") == 2.0
    assert math.isnan(reported(bench.update("a", 0, 1, {}), "loss"))
    assert math.isnan(reported(Update("a", 0, 1, {}, {}, {"loss": [1.0, 2.0]}), "loss"))


def test_normalise_by_hand_and_without_a_sum() -> None:
    np.testing.assert_allclose(normalise(np.array([1.0, 3.0]), np.ones(2)), [0.25, 0.75])
    np.testing.assert_allclose(normalise(np.zeros(2), np.array([1.0, 4.0])), [0.2, 0.8])
    np.testing.assert_allclose(normalise(np.array([np.inf, 1.0]), np.ones(2)), [0.5, 0.5])


def test_restriction_to_the_replies() -> None:
    shares, mass = restrict(HISTORY, ["a", "c"], np.full(2, 1 / 3))
    np.testing.assert_allclose(shares, [5 / 7, 2 / 7])
    assert mass == pytest.approx(0.7)


def test_newcomer_holds_the_default() -> None:
    shares, mass = restrict(HISTORY, ["b", "new"], np.full(2, 0.3))
    np.testing.assert_allclose(shares, [0.5, 0.5])
    assert mass == pytest.approx(0.6)


def test_nothing_held_is_the_default() -> None:
    shares, mass = restrict({"a": 1.0, "b": 0.0, "c": 0.0}, ["b", "c"], np.array([0.1, 0.3]))
    np.testing.assert_allclose(shares, [0.25, 0.75])
    assert mass == pytest.approx(0.4)
    assert restrict({}, ["a"], np.ones(1))[0].tolist() == [1.0]


def test_absent_sites_keep_their_share() -> None:
    shares, mass = restrict(HISTORY, ["a", "c"], np.full(2, 1 / 3))
    kept = remember(HISTORY, ["a", "c"], shares, mass)
    assert kept == pytest.approx(HISTORY)
    moved = remember(HISTORY, ["a", "c"], np.array([0.0, 1.0]), mass)
    assert moved == pytest.approx({"a": 0.0, "b": 0.3, "c": 0.7})
    assert HISTORY == {"a": 0.5, "b": 0.3, "c": 0.2}


def test_newcomers_take_from_everybody() -> None:
    shares, mass = restrict(HISTORY, ["new"], np.full(1, 1 / 3))
    kept = remember(HISTORY, ["new"], shares, mass)
    assert kept == pytest.approx({"a": 0.375, "b": 0.225, "c": 0.15, "new": 0.25})
    assert remember({}, [], np.zeros(0), 0.0) == {}
