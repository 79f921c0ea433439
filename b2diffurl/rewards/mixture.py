"""A mixture of rewards: their weighted sum, either of the raw values or of standardised ones.

N images
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from b2diffurl.experiment.stage import finished_stages

Scales = dict[str, list[float]]  # name of a reward -> [mean, standard deviation]


def combine(values: Mapping[str, Tensor], weights: Mapping[str, float], scales: Scales | None) -> Tensor:
    """The mixture, float32 [N]: the sum of weight * (value - mean) / deviation over the rewards, `values` by name, each [N].

    Without `scales` it is the sum of weight * value.
    """
    total = torch.zeros(1, dtype=torch.float64)
    for name, weight in weights.items():
        mean, deviation = scales[name] if scales else (0.0, 1.0)
        total = total + weight * (values[name].double() - mean) / deviation
    return total.float()


def measure_scales(values: Mapping[str, Tensor]) -> Scales:
    """Mean and standard deviation of each reward [N]. The deviation is 1 if all values are equal, to avoid dividing by 0."""
    scales = {}
    for name, numbers in values.items():
        deviation = numbers.double().std(unbiased=False).item()
        scales[name] = [numbers.double().mean().item(), deviation or 1.0]
    return scales


def recorded_scales(root: Path) -> Scales | None:
    """The scales measured in the experiment's first selected stage; None if no stage is selected yet.

    All stages use these. With scales of its own, every stage would have mean reward 0, so learning would not show, and the
    rewards in a prompt's history would have different units.
    """
    selected = finished_stages(root, "select")
    return selected[0].manifest("select").get("scales") if selected else None
