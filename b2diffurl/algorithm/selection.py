"""Which trajectories of a stage are trained on (arXiv 2503.11240, section 4.2).

G groups, K branches, N = G*K images in group-major order
D depths of the tree in which a group's trajectories part
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from b2diffurl.algorithm.tree import Tree


@dataclass(frozen=True)
class Selected:
    """One trajectory to train on: its group, its branch in the group, and its normalised score."""

    group: int
    branch: int
    score: float


def select_pairs(scores: Tensor, *, pos_threshold: float, neg_threshold: float) -> list[Selected]:
    """Contrast pairs: of each group the best sibling if its score is >= pos_threshold, the worst if it is < neg_threshold.

    scores [G,K] -> 0, 1 or 2 trajectories of each group, the best first. Among equal scores the lowest branch is taken. With
    pos_threshold >= neg_threshold no sibling is both best and worst.
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
    """Every trajectory, scores [G,K]: plain policy gradient, without contrast pairs."""
    return [Selected(group, branch, score) for group, row in enumerate(scores.tolist()) for branch, score in enumerate(row)]


def contrast_pairs(selected: Sequence[Selected]) -> list[tuple[int, int]]:
    """(best, worst) of each group that kept both, as positions in `selected`, the result of `select_pairs`."""
    positions = defaultdict(list)
    for position, trajectory in enumerate(selected):
        positions[trajectory.group].append(position)
    # `select_pairs` puts a group's best sibling first.
    return [(group[0], group[1]) for group in positions.values() if len(group) == 2]


def owned_edges(selected: Sequence[Selected], tree: Tree) -> Tensor:
    """Which edges each selected trajectory is trained on, bool [selected,D].

    An edge that several of them share belongs to the first, so that its transitions are trained once.
    """
    taken: set[tuple[int, int, int]] = set()
    owned = torch.zeros(len(selected), tree.num_depths, dtype=torch.bool)
    for row, one in enumerate(selected):
        for depth in range(tree.num_depths):
            edge = (one.group, depth, one.branch // tree.leaves_below(depth))
            owned[row, depth] = edge not in taken
            taken.add(edge)
    return owned
