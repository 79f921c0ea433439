"""How the study's page shows figures: in words, and as curves with bands."""

from collections.abc import Sequence
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.study_statistics import Interval, Runs, interval

SETS = {"train": "training", "test": "held-out"}


def present(runs: Runs, names: Sequence[str]) -> list[str]:
    """The variants of `names` that have a finished run."""
    return [name for name in names if name in runs]


def spread(values: Sequence[float], form: str = "{:.1f}", scale: float = 1.0) -> str:
    """`mean ± standard deviation` in words; the mean alone if there is one value."""
    mean = form.format(scale * fmean(values))
    return f"{mean} ± {form.replace('+', '').format(scale * stdev(values))}" if len(values) > 1 else mean


def shown(found: Interval | None, key: str) -> str:
    """`**difference** [low, high]` in words, accuracies in points; "" for None."""
    if found is None:
        return ""
    scale, form = {"accuracy": (100, "{:+.1f}"), "diversity/layout_right": (1, "{:+.2f}")}.get(key, (1, "{:+.4f}"))
    mean, low, high = (form.format(scale * value) for value in (found.mean, found.low, found.high))
    return f"**{mean}** [{low}, {high}]"


def draw_band(panel: plt.Axes, x: Sequence[float], curves: np.ndarray, colour: str, label: str) -> None:
    """Draw the mean of curves [seeds,points] with a band, its 95 % interval."""
    panel.plot(x, curves.mean(0), color=colour, lw=2.2, label=label, marker="o", ms=3.5)
    if len(curves) > 1:
        bands = [interval(values) for values in curves.T.tolist()]
        panel.fill_between(x, [one.low for one in bands], [one.high for one in bands], color=colour, alpha=0.13, lw=0)
