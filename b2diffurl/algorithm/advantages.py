"""From raw rewards to advantages (arXiv 2503.11240, section 4.2).

K branches, N images, N = G*K in group-major order
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(
    rewards: Tensor, prompts: Sequence[str], history: Sequence[tuple[str, float]] = (), *, num_siblings: int = 0
) -> Tensor:
    """Standardise each reward [N] by the mean and (unbiased) standard deviation of its prompt, [N] float32.

    `history` holds (prompt, reward) of earlier stages. A prompt seen once, or whose rewards are all equal, scores 0.
    With `num_siblings` K the mean is that of the K siblings instead: what their shared prefix decided drops out. The
    scale stays the prompt's, so that siblings that hardly differ score about 0, not +-1.
    """
    seen = defaultdict(list)
    for prompt, reward in [*history, *zip(prompts, rewards.tolist(), strict=True)]:
        seen[prompt].append(reward)
    mean, std = {}, {}
    for prompt, some in seen.items():
        values = torch.tensor(some, dtype=torch.float64)
        mean[prompt] = values.mean()
        std[prompt] = values.std() if values.max() > values.min() else math.inf
    if num_siblings:
        baseline = rewards.double().unflatten(0, (-1, num_siblings)).mean(1).repeat_interleave(num_siblings)
    else:
        baseline = torch.stack([mean[prompt] for prompt in prompts])
    return ((rewards.double() - baseline) / torch.tensor([std[prompt] for prompt in prompts])).float()


def advantages(scores: Tensor, *, clip: float, positive_weight: float, negative_weight: float) -> Tensor:
    """Normalised scores [N] clamped to +-clip, times positive_weight where > 0 and negative_weight elsewhere, [N]."""
    weight = torch.where(scores > 0, positive_weight, negative_weight)
    return scores.clamp(-clip, clip) * weight
