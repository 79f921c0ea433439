"""95 % intervals of an evaluation's figures, and of a figure's change between two models on the same noise.

Images of one prompt are alike: a model draws some prompts well and others badly. So it is not the number of images that
counts but that of prompts, and an interval is for the mean over prompts like these.

N images
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

MIN_PROMPTS = 8  # fewer say next to nothing about others: the interval is then for other images of these prompts
MIN_CHANGED = 6  # units that have to change: that 5 all rise or all fall is chance in 1 of 16 cases, 6 in 1 of 32
NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571)  # the same of Student's t with 1, …, 5 degrees of freedom


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval. Units are prompts or, where there are fewer than MIN_PROMPTS of them, images."""

    mean: float
    low: float | None  # None: a single unit has no spread
    high: float | None
    error: float | None  # standard error of the mean
    num_units: int
    num_changed: int  # units that have a value other than 0
    over_prompts: bool  # whether units are prompts

    @property
    def is_significant(self) -> bool:
        """Of a change: whether it is one, and not chance."""
        return self.low is not None and not self.low <= 0 <= self.high and self.num_changed >= MIN_CHANGED


def interval(values: Sequence[float | None], prompts: Sequence[Hashable]) -> Interval | None:
    """The interval of the mean of values [N] of images with these prompts [N]. None is left out; None if all are.

    It is Student's, by `clustered`. Values that are all 0 or 1, such as a judge's, have Wilson's interval, which stays
    between them: that of as many independent images as would have the same standard error.
    """
    found = clustered(values, prompts)
    if found is None or found.error is None or not all(value in (0.0, 1.0, None) for value in values):
        return found
    share = found.mean
    independent = share * (1 - share) / found.error**2 if found.error else found.num_units
    low, high = wilson(share, independent, student(found.num_units - 1))
    return replace(found, low=low, high=high)


def change(after: Sequence[float | None], before: Sequence[float | None], prompts: Sequence[Hashable]) -> Interval | None:
    """The interval of the mean of after - before [N], image by image, over the images for which neither is None."""
    pairs = zip(after, before, strict=True)
    return clustered([None if new is None or old is None else new - old for new, old in pairs], prompts)


def clustered(values: Sequence[float | None], prompts: Sequence[Hashable], least: int = MIN_PROMPTS) -> Interval | None:
    """The mean of values [N] with Student's interval; its standard error is that of a ratio with the units as clusters.

    With one image a prompt that is the usual one. With fewer than `least` prompts the images are the units.
    """
    kept = [(float(value), prompt) for value, prompt in zip(values, prompts, strict=True) if value is not None]
    if not kept:
        return None
    over_prompts = len({prompt for _, prompt in kept}) >= least
    units: dict[Hashable, list[float]] = defaultdict(list)
    for n, (value, prompt) in enumerate(kept):
        units[prompt if over_prompts else n].append(value)
    mean = math.fsum(value for value, _ in kept) / len(kept)
    counts = len(units), sum(any(unit) for unit in units.values()), over_prompts
    if len(units) == 1:
        return Interval(mean, None, None, None, *counts)
    squares = math.fsum(math.fsum(value - mean for value in unit) ** 2 for unit in units.values())
    error = math.sqrt(squares * len(units) / (len(units) - 1)) / len(kept)
    half = student(len(units) - 1) * error
    return Interval(mean, mean - half, mean + half, error, *counts)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from the sixth degree of freedom on by the expansion in 1 / freedom."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    """Both ends of Wilson's interval of a share among `count` images (Wilson 1927)."""
    square = quantile**2 / count
    centre, half = share + square / 2, quantile * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))
