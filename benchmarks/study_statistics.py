"""Statistics of benchmarks.study: runs with the same seed are paired, and a seed is one observation.

A run is a dict of study.json; its curve begins with the base model, at no cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student

Run = dict[str, Any]
Runs = dict[str, dict[int, Run]]  # variant -> seed -> run


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % confidence interval over seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "supported"
        return "not supported" if self.high < 0 else "undecided"


def by_variant(runs: Sequence[Run]) -> Runs:
    found: Runs = {}
    for run in runs:
        found.setdefault(run["name"], {})[run["seed"]] = run
    return found


def differences(runs: Runs, one: str, other: str, measure: Callable[[Run, Run], float]) -> list[float]:
    """measure(run of `one`, run of `other`) for each seed that both have."""
    mine, theirs = runs.get(one, {}), runs.get(other, {})
    return [measure(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


def final(prompts: str, key: str) -> Callable[[Run, Run], float]:
    """Difference of the last figures."""
    return lambda one, other: one["curve"][-1][prompts][key] - other["curve"][-1][prompts][key]


def gain(prompts: str, key: str) -> Callable[[Run, Run], float]:
    """How far a run came from the base; the other run is not looked at."""
    return lambda run, _other: run["curve"][-1][prompts][key] - run["curve"][0][prompts][key]


def at_equal_cost(prompts: str, key: str, cost: str) -> Callable[[Run, Run], float]:
    """Difference where both have spent what the cheaper one spent in all, interpolated along the curves."""

    def measure(one: Run, other: Run) -> float:
        spent = min(run["curve"][-1][cost] for run in (one, other))
        first, second = (
            np.interp(spent, [point[cost] for point in run["curve"]], [point[prompts][key] for point in run["curve"]])
            for run in (one, other)
        )
        return float(first - second)

    return measure


def at_matched_accuracy(prompts: str, key: str) -> Callable[[Run, Run], float]:
    """Difference where both are as accurate as the less accurate one became, interpolated along the curves."""

    def measure(one: Run, other: Run) -> float:
        reached = matched_accuracy(prompts)(one, other)
        return value_at(one, prompts, key, reached) - value_at(other, prompts, key, reached)

    return measure


def value_at(run: Run, prompts: str, key: str, accuracy: float) -> float:
    """The figure where the curve first comes to that accuracy; that of the base if it begins there."""
    points = [point[prompts] for point in run["curve"]]
    if accuracy <= points[0]["accuracy"]:
        return points[0][key]
    for before, after in pairwise(points):
        if before["accuracy"] < accuracy <= after["accuracy"]:
            share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[key] + share * (after[key] - before[key])
    raise ValueError(f"the run never came to an accuracy of {accuracy}")


def matched_accuracy(prompts: str) -> Callable[[Run, Run], float]:
    """What the less accurate run of two became: where `at_matched_accuracy` compares them."""
    return lambda one, other: min(max(point[prompts]["accuracy"] for point in run["curve"]) for run in (one, other))


def interval(values: Sequence[float], *, pooled: tuple[float, int] | None = None) -> Interval | None:
    """Student's t interval of the mean; with `pooled` (deviation, degrees of freedom) in place of the values' own.

    Two seeds say next to nothing of their own spread, so comparisons of few seeds take that of several together. None
    where there is nothing to go by.
    """
    if not values or (pooled is None and len(values) < 2):
        return None
    deviation, freedom = pooled or (stdev(values), len(values) - 1)
    half = float(student.ppf(0.975, freedom)) * deviation / math.sqrt(len(values))
    mean = fmean(values)
    return Interval(mean, mean - half, mean + half, len(values))


def pooled_deviation(samples: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """The common standard deviation of several samples, and its degrees of freedom; None if these are 0."""
    freedom = sum(len(some) - 1 for some in samples if some)
    if not freedom:
        return None
    squares = sum((value - fmean(some)) ** 2 for some in samples for value in some)
    return math.sqrt(squares / freedom), freedom
