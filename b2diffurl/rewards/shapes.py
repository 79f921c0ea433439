"""The embedded world's exact checker as a sparse reward: 1 if the picture shows what the prompt says, else 0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from b2diffurl.shapes.checker import check


def shapes(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Images uint8 [N,64,64,3] -> rewards [N] in {0, 1}, and each part of the prompt on its own."""
    verdicts = check(images, prompts)
    parts = {"well_formed": [verdict.well_formed for verdict in verdicts]}
    for key in dict.fromkeys(key for verdict in verdicts for key in verdict.parts):
        parts[key] = [verdict.parts.get(key, verdict.well_formed) for verdict in verdicts]
    rewards = torch.tensor([verdict.correct for verdict in verdicts], dtype=torch.float32)
    return rewards, {key: torch.tensor(values, dtype=torch.float32) for key, values in parts.items()}
