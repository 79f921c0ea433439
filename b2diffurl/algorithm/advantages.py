"""From rewards to advantages (arXiv 2503.11240, section 4.2).

N images, K siblings in a group; the siblings of a group lie next to each other and share a prompt
D depths of the tree in which a group's trajectories part
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from b2diffurl.algorithm.tree import Tree


def normalise(
    rewards: Tensor, prompts: Sequence[str], history: Sequence[tuple[str, float]] = (), *, num_siblings: int = 0
) -> Tensor:
    """Scores: each reward minus a baseline, over the standard deviation of its prompt's rewards, [N] -> [N] float32.

    A prompt's rewards are those in `rewards` and those in `history`, the (prompt, reward) of earlier stages. The baseline is
    their mean; the deviation is the unbiased one. A prompt seen once, or whose rewards are all equal, scores 0.

    With `num_siblings` K the baseline is the mean of the K siblings. The part of the reward that their shared prefix has
    decided then drops out. The deviation stays the prompt's, so that siblings that hardly differ score about 0, not +-1.
    """
    baseline, deviation = standards(rewards, prompts, history, num_siblings)
    return ((rewards.double() - baseline) / deviation).float()


def edge_scores(
    rewards: Tensor,
    prompts: Sequence[str],
    history: Sequence[tuple[str, float]] = (),
    *,
    num_siblings: int = 0,
    tree: Tree,
) -> Tensor:
    """The score of each edge on a leaf's way: the mean reward of the edge's leaves minus that of the edge before it, over
    the prompt's standard deviation, [N] -> [N,D] float32.

    So an edge is compared with its siblings, itself included. Before the first edges comes the baseline of `normalise`: a
    leaf's edges add up to its score there, and a tree of one depth has its scores, to the bit.
    """
    mean, deviation = standards(rewards, prompts, history, num_siblings)
    scores = []
    for depth in range(tree.num_depths):
        before, mean = mean, tree.means(rewards.double(), depth)
        scores.append((mean - before) / deviation)
    return torch.stack(scores, 1).float()


def standards(
    rewards: Tensor, prompts: Sequence[str], history: Sequence[tuple[str, float]], num_siblings: int
) -> tuple[Tensor, Tensor]:
    """What the rewards of N images are compared with, as `normalise` has it: baseline [N] and standard deviation [N]."""
    seen = defaultdict(list)
    for prompt, reward in [*history, *zip(prompts, rewards.tolist(), strict=True)]:
        seen[prompt].append(reward)
    # float64, because the rewards of a prompt may differ by little compared with their size.
    mean, std = {}, {}
    for prompt, prompt_rewards in seen.items():
        values = torch.tensor(prompt_rewards, dtype=torch.float64)
        mean[prompt] = values.mean()
        # Infinite where nothing can be learnt, so that the score is 0. Equal rewards are compared as they are: their
        # computed deviation may be a rounding error instead of 0, and that of a single reward is NaN.
        std[prompt] = values.std() if values.max() > values.min() else math.inf
    if num_siblings:
        baseline = rewards.double().unflatten(0, (-1, num_siblings)).mean(1).repeat_interleave(num_siblings)
    else:
        baseline = torch.stack([mean[prompt] for prompt in prompts])
    return baseline, torch.tensor([std[prompt] for prompt in prompts])


def advantages(scores: Tensor, *, clip: float, positive_weight: float, negative_weight: float) -> Tensor:
    """Scores clamped to +-clip, times `positive_weight` where they are > 0 and `negative_weight` elsewhere; any shape."""
    weight = torch.where(scores > 0, positive_weight, negative_weight)
    return scores.clamp(-clip, clip) * weight
