"""The exact checker of the shapes world as a sparse reward: 1 if the image shows what the prompt says, else 0."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.rewards import Reward
from b2diffurl.shapes import checker
from b2diffurl.shapes.scene import parse


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    for prompt in prompts:
        parse(prompt)


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return []


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    return shapes


def shapes(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Images uint8 [N,64,64,3] -> rewards [N] in {0, 1}, and the checker's verdicts on the parts of the prompt, likewise."""
    verdicts = checker.check(images, prompts)
    parts = {"well_formed": [verdict.well_formed for verdict in verdicts]}
    # Not every prompt has every part. One without a relation, say, counts as right in it if the image is well formed.
    for key in dict.fromkeys(key for verdict in verdicts for key in verdict.parts):
        parts[key] = [verdict.parts.get(key, verdict.well_formed) for verdict in verdicts]
    rewards = torch.tensor([verdict.correct for verdict in verdicts], dtype=torch.float32)
    return rewards, {key: torch.tensor(values, dtype=torch.float32) for key, values in parts.items()}


def layouts(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Where the image shows what its prompt names, [N,6]: x, y and size in px of the first thing, then of the second.

    A prompt that names one thing has 0 for the second. A thing that the image does not show has NaN.
    """
    rows = torch.zeros(len(prompts), 6)
    for n, (verdict, prompt) in enumerate(zip(checker.check(images, prompts), map(parse, prompts), strict=True)):
        seen = {item.thing: (item.x_px, item.y_px, item.size_px) for item in verdict.objects}
        places = [place for thing in prompt.things for place in seen.get(thing, (math.nan,) * 3)]
        rows[n, : len(places)] = torch.tensor(places)
    return rows
