"""Statistics of benchmarks.study. Runs with the same seed are paired, and each seed is one observation.

A Run is a dict in study.json. The first point of its curve is the base model, at cost 0. A point may lack a cost that was
not measured, such as `cpu_seconds`.
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
SAME_IMAGES = 0.01  # relative: groups of another size do not make exactly as many images


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % confidence interval over seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def verdict(self) -> str:
        """Whether the interval supports the claim that the difference is above 0."""
        if self.low > 0:
            return "supported"
        return "not supported" if self.high < 0 else "undecided"


def by_variant(runs: Sequence[Run]) -> Runs:
    """Group runs by the name of their variant, then by seed."""
    found: Runs = {}
    for run in runs:
        found.setdefault(run["name"], {})[run["seed"]] = run
    return found


def differences(runs: Runs, one: str, other: str, measure: Callable[[Run, Run], float]) -> list[float]:
    """measure(run of variant `one`, run of variant `other`) for each seed that both have, in order."""
    mine, theirs = runs.get(one, {}), runs.get(other, {})
    return [measure(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


def final(prompts: str, key: str) -> Callable[[Run, Run], float]:
    """A measure: the difference of figure `key` at the end of the two runs, which must have scored equally many images."""

    def measure(one: Run, other: Run) -> float:
        ends = [run["curve"][-1] for run in (one, other)]
        if not math.isclose(*(end["queries"] for end in ends), rel_tol=SAME_IMAGES):
            counts = " and ".join(
                f"{run['name']} scored {end['queries']:,.0f} images" for run, end in zip((one, other), ends, strict=True)
            )
            raise ValueError(f"{counts}: their ends cannot be compared; compare them at equal cost")
        return ends[0][prompts][key] - ends[1][prompts][key]

    return measure


def gain(prompts: str, key: str) -> Callable[[Run, Run], float]:
    """A measure: the gain of the first run over the base; the second run is ignored."""
    return lambda run, _other: run["curve"][-1][prompts][key] - run["curve"][0][prompts][key]


def at_equal_cost(prompts: str, key: str, cost: str) -> Callable[[Run, Run], float]:
    """A measure: the difference at equal cost, namely the total cost of the cheaper run, interpolated along the curves."""

    def measure(one: Run, other: Run) -> float:
        spent = min(run["curve"][-1][cost] for run in (one, other))
        first, second = (
            np.interp(spent, [point[cost] for point in run["curve"]], [point[prompts][key] for point in run["curve"]])
            for run in (one, other)
        )
        return float(first - second)

    return measure


def at_matched_accuracy(prompts: str, key: str) -> Callable[[Run, Run], float]:
    """A measure: the difference at equal accuracy, the best of the less accurate run, interpolated along the curves."""

    def measure(one: Run, other: Run) -> float:
        reached = matched_accuracy(prompts)(one, other)
        return value_at(one, prompts, key, reached) - value_at(other, prompts, key, reached)

    return measure


def value_at(run: Run, prompts: str, key: str, accuracy: float) -> float:
    """Figure `key` where the curve first reaches `accuracy`, interpolated; the base's if the base already has it."""
    position = position_at(run, prompts, accuracy)
    if position is None:
        raise ValueError(f"the run never came to an accuracy of {accuracy}")
    return along(position, [point[prompts][key] for point in run["curve"]])


def cost_to_reach(run: Run, prompts: str, accuracy: float, cost: str) -> float | None:
    """What the run had spent where its curve first reaches `accuracy`, interpolated; None if it never does."""
    position = position_at(run, prompts, accuracy)
    return None if position is None else along(position, [point[cost] for point in run["curve"]])


def position_at(run: Run, prompts: str, accuracy: float) -> float | None:
    """Where the curve first reaches `accuracy`, as the number of a point: 1.5 is half-way from point 1 to point 2."""
    reached = [point[prompts]["accuracy"] for point in run["curve"]]
    if accuracy <= reached[0]:
        return 0.0
    for number, (before, after) in enumerate(pairwise(reached)):
        if before < accuracy <= after:
            return number + (accuracy - before) / (after - before)
    return None


def along(position: float, values: Sequence[float]) -> float:
    """The value at a position between the numbers of two points."""
    return float(np.interp(position, range(len(values)), values))


def mean_curve(runs: Sequence[Run]) -> Run:
    """A run whose points are the means of the runs' points: of accuracies, and of the costs that all of them have."""
    curve = []
    for points in zip(*(run["curve"] for run in runs), strict=True):
        costs = {cost for cost, value in points[0].items() if not isinstance(value, dict)}
        point: dict[str, Any] = {
            cost: fmean(one[cost] for one in points) for cost in costs if all(cost in one for one in points)
        }
        for prompts in points[0].keys() - costs:
            point[prompts] = {"accuracy": fmean(one[prompts]["accuracy"] for one in points)}
        curve.append(point)
    return {"curve": curve}


def with_cost(runs: Runs, cost: str) -> Runs:
    """The runs for which this cost is known."""
    kept = {name: {seed: run for seed, run in some.items() if cost in run["curve"][-1]} for name, some in runs.items()}
    return {name: some for name, some in kept.items() if some}


def with_cpu_seconds(runs: Sequence[Run], per_evaluation: dict[str, float]) -> list[Run]:
    """The runs with the CPU seconds of calibrated arms, which are their evaluations times the seconds for one.

    `per_evaluation` gives those seconds by variant. Runs of other variants keep what was measured, if anything was.
    """

    def counted(run: Run) -> Run:
        seconds = per_evaluation.get(run["name"])
        if seconds is None:
            return run
        return run | {"curve": [point | {"cpu_seconds": seconds * point["evaluations"]} for point in run["curve"]]}

    return [counted(run) for run in runs]


def matched_accuracy(prompts: str) -> Callable[[Run, Run], float]:
    """A measure: the accuracy at which `at_matched_accuracy` compares two runs, the lower of their two maxima."""
    return lambda one, other: min(max(point[prompts]["accuracy"] for point in run["curve"]) for run in (one, other))


def interval(values: Sequence[float], *, pooled: tuple[float, int] | None = None) -> Interval | None:
    """Student's t interval, 95 %, of the mean of `values`; None if there are too few.

    `pooled` (standard deviation, degrees of freedom) replaces the deviation of `values` themselves. Two or three seeds say
    little about their own spread, so such comparisons use a deviation pooled over several.
    """
    if not values or (pooled is None and len(values) < 2):
        return None
    deviation, freedom = pooled or (stdev(values), len(values) - 1)
    half = float(student.ppf(0.975, freedom)) * deviation / math.sqrt(len(values))
    mean = fmean(values)
    return Interval(mean, mean - half, mean + half, len(values))


def pooled_deviation(samples: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """The pooled standard deviation of several samples and its degrees of freedom; None if these are 0."""
    freedom = sum(len(some) - 1 for some in samples if some)
    if not freedom:
        return None
    squares = sum((value - fmean(some)) ** 2 for some in samples for value in some)
    return math.sqrt(squares / freedom), freedom
