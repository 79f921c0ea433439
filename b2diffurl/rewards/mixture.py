"""A mixture of rewards: their weighted sum, as they are or each in units of its own deviation.

N images
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from b2diffurl.experiment.stage import finished_stages

Scales = dict[str, list[float]]  # mean and deviation of each reward


def combine(values: Mapping[str, Tensor], weights: Mapping[str, float], scales: Scales | None) -> Tensor:
    """sum of weight * (value - mean) / deviation, float32 [N], of rewards [N] by name; as they are without `scales`."""
    total = torch.zeros(1, dtype=torch.float64)
    for name, weight in weights.items():
        mean, deviation = scales[name] if scales else (0.0, 1.0)
        total = total + weight * (values[name].double() - mean) / deviation
    return total.float()


def measure_scales(values: Mapping[str, Tensor]) -> Scales:
    """Mean and deviation of rewards [N]; a deviation of 1 where all are equal."""
    scales = {}
    for name, numbers in values.items():
        deviation = numbers.double().std(unbiased=False).item()
        scales[name] = [numbers.double().mean().item(), deviation or 1.0]
    return scales


def recorded_scales(root: Path) -> Scales | None:
    """The scales of the experiment's earliest selected stage, which hold for all; None before there is one.

    Scales of each stage's own would hide that the reward rises, and mix units in a prompt's history.
    """
    selected = finished_stages(root, "select")
    return selected[0].manifest("select").get("scales") if selected else None
