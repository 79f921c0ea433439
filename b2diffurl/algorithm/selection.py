"""From raw rewards to what is trained on (arXiv 2503.11240, section 4.2).

G groups, K branches, N = G*K images in group-major order
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selected:
    """One trajectory to train on: where it lies and its normalised score."""

    group: int
    branch: int
    score: float


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


def select_pairs(scores: Tensor, *, pos_threshold: float, neg_threshold: float) -> list[Selected]:
    """Keep of each group the best sibling if its score >= pos_threshold and the worst if < neg_threshold.

    scores [G,K] -> 0, 1 or 2 trajectories a group, best first; the lowest branch wins a tie. With
    pos_threshold >= neg_threshold no sibling is both.
    """
    selected = []
    for group, row in enumerate(scores.tolist()):
        best, worst = row.index(max(row)), row.index(min(row))
        if row[best] >= pos_threshold:
            selected.append(Selected(group, best, row[best]))
        if row[worst] < neg_threshold:
            selected.append(Selected(group, worst, row[worst]))
    return selected


def select_all(scores: Tensor) -> list[Selected]:
    """Keep every trajectory, scores [G,K]: plain policy gradient, without contrast pairs."""
    return [Selected(group, branch, score) for group, row in enumerate(scores.tolist()) for branch, score in enumerate(row)]


def contrast_pairs(selected: Sequence[Selected]) -> list[tuple[int, int]]:
    """(best, worst) of each group of which both were kept, as positions in `selected`, which holds what `select_pairs` kept:
    a group's best first."""
    members = defaultdict(list)
    for position, one in enumerate(selected):
        members[one.group].append(position)
    return [(group[0], group[1]) for group in members.values() if len(group) == 2]


def advantages(scores: Tensor, *, clip: float, positive_weight: float, negative_weight: float) -> Tensor:
    """Normalised scores [N] clamped to +-clip, times positive_weight where > 0 and negative_weight elsewhere, [N]."""
    weight = torch.where(scores > 0, positive_weight, negative_weight)
    return scores.clamp(-clip, clip) * weight
