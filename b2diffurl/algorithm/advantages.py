"""From rewards to advantages (arXiv 2503.11240, section 4.2).

N images, K siblings in a group; the siblings of a group lie next to each other and share a prompt
D depths of the tree in which a group's trajectories part
"""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence

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


def weigh(scores: Collection[Tensor], weights: Collection[float]) -> Tensor:
    """The scores of several rewards as one, sum_k w_k s_k / sqrt(sum_k w_k^2); each s_k, and the result, is of one shape.

    After GDPO (arXiv 2601.05242), whose last step, by mean and deviation of the batch, is left out (docs/method.md). If the
    rewards do not correlate the result has the spread of a single score, so thresholds and clipping keep their meaning.
    """
    unit = math.hypot(*weights)
    first, *others = (weight / unit * score.double() for score, weight in zip(scores, weights, strict=True))
    return sum(others, first).float()  # begun with the first: of one reward every bit is kept, the sign of a 0 too


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of x [N] and y [N]; 0 if either does not vary."""
    x, y = (values.double() - values.double().mean() for values in (x, y))
    size = (x.norm() * y.norm()).item()
    return (x @ y).item() / size if size else 0.0


def advantages(scores: Tensor, *, clip: float, positive_weight: float, negative_weight: float) -> Tensor:
    """Scores clamped to +-clip, times `positive_weight` where they are > 0 and `negative_weight` elsewhere; any shape."""
    weight = torch.where(scores > 0, positive_weight, negative_weight)
    return scores.clamp(-clip, clip) * weight
