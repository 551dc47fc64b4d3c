"""Learning rate of a round. It depends on the round alone, not on how often a site took part, so a site that was away is in step."""

from __future__ import annotations

from collections.abc import Sequence

from fedmed.config import OptimizerConfig


def multistep(lr: float, round: int, milestones: Sequence[int], factor: float) -> float:
    """lr · factor^(number of milestones reached), a milestone m counting from round m on. Rounds count from 1."""
    return float(lr * factor ** sum(round >= m for m in milestones))


def polynomial(lr: float, round: int, rounds: int, power: float) -> float:
    """lr · (1 − t/T)^power, rounded to 8 decimals as the field does; t = round − 1 in 0 … T − 1. T < 1: lr."""
    return round_to(lr * (1.0 - (round - 1) / rounds) ** power) if rounds >= 1 else lr


def round_to(value: float, digits: int = 8) -> float:
    """`value` to so many decimals, but never 0 for a positive one: an optimiser needs a learning rate."""
    rounded = round(value, digits)
    return rounded if rounded > 0 else value


def learning_rate(optimizer: OptimizerConfig, round: int, rounds: int) -> float:
    """Learning rate of a round (from 1) of `rounds` by `optimizer.schedule`."""
    rules = {
        "constant": lambda: optimizer.lr,
        "multistep": lambda: multistep(optimizer.lr, round, optimizer.milestones, optimizer.factor),
        "poly": lambda: polynomial(optimizer.lr, round, rounds, optimizer.power),
    }
    return rules[optimizer.schedule]()
