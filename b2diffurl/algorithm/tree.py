"""A tree of branches: in which steps the trajectories of a group part, and which of them share a transition.

    (2, 3) children, parting again after 3 steps:  one state parts into 2; three steps later each of the 2 parts into 3

An edge is the way from one parting to the next, and from the last one to the leaves. D depths count the edges from a leaf's
root to the leaf. K leaves, in depth-first order: the leaves below an edge lie next to each other.

N = G*K trajectories in group-major order, S trained steps
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """How the trajectories of a group part. The first parting is at the start of the trained window."""

    children: tuple[int, ...]  # [D] edges into which a state parts at each depth
    after: tuple[int, ...] = ()  # [D-1] trained steps from one parting to the next

    @property
    def num_depths(self) -> int:
        return len(self.children)

    @property
    def num_leaves(self) -> int:
        return prod(self.children)

    @property
    def starts(self) -> tuple[int, ...]:
        """The trained step with which the edges of each depth begin, [D]."""
        return tuple(accumulate(self.after, initial=0))

    @property
    def text(self) -> str:
        """For people, to follow a number of images: "" if they part once, else ` in a tree of 2 x 3`."""
        return f" in a tree of {' x '.join(map(str, self.children))}" if self.after else ""

    def depth(self, step: int) -> int:
        """The depth of the edges that the trained step `step` belongs to."""
        return bisect_right(self.starts, step) - 1

    def depths(self, num_steps: int) -> list[int]:
        """The depth of each of S trained steps, [S]."""
        return [self.depth(step) for step in range(num_steps)]

    def num_edges(self, depth: int) -> int:
        """How many edges of this depth a group has: so many transitions of a step of this depth are distinct."""
        return prod(self.children[: depth + 1])

    def leaves_below(self, depth: int) -> int:
        """How many leaves share an edge of this depth. Leaf k's edge is k // leaves_below(depth)."""
        return self.num_leaves // self.num_edges(depth)

    def means(self, values: Tensor, depth: int) -> Tensor:
        """For each leaf the mean over the leaves that share its edge of this depth, [N] -> [N]."""
        leaves = self.leaves_below(depth)
        return values.unflatten(0, (-1, leaves)).mean(1).repeat_interleave(leaves)

    def num_evaluations(self, num_steps: int) -> int:
        """Network evaluations of S trained steps in one group: each distinct state is evaluated once."""
        return sum(self.num_edges(depth) for depth in self.depths(num_steps))


def to_leaves(states: list[Tensor], num_rows: int) -> Tensor:
    """Stack the rows of several steps, each [<=N, ...], repeating a shared row for every leaf below it: [N, steps, ...]."""
    return torch.stack([rows.repeat_interleave(num_rows // len(rows), dim=0) for rows in states], 1)
