"""Trees worked by hand: which leaves share an edge, what an edge is worth, and who is trained on it."""

import math

import pytest
import torch

from b2diffurl.algorithm.advantages import edge_scores, normalise
from b2diffurl.algorithm.selection import Selected, owned_edges
from b2diffurl.algorithm.tree import Tree, to_leaves

TWO_BY_TWO = Tree((2, 2), (3,))


def test_partings_by_hand():
    """One state parts into 2, and each of the 2 after three steps into 3: so many edges, leaves and evaluations."""
    tree = Tree((2, 3), (3,))
    assert (tree.num_leaves, tree.num_depths, tree.starts) == (6, 2, (0, 3))
    assert tree.depths(5) == [0, 0, 0, 1, 1]
    assert [tree.num_edges(depth) for depth in range(2)] == [2, 6]
    assert [[leaf // tree.leaves_below(depth) for leaf in range(6)] for depth in range(2)] == [
        [0, 0, 0, 1, 1, 1],
        [0, 1, 2, 3, 4, 5],
    ]
    assert tree.num_evaluations(5) == 3 * 2 + 2 * 6
    three = Tree((2, 1, 2), (1, 2))
    assert (three.starts, three.depths(4)) == ((0, 1, 3), [0, 1, 1, 2])
    assert Tree((5,)).num_evaluations(4) == 4 * 5
    assert Tree((5,)).depths(4) == [0] * 4


def test_rows_are_repeated_for_the_leaves_below_them():
    """Two groups of 2 x 2: the first step has a row for each of 4 edges, the second one for each of 8 leaves."""
    found = to_leaves([torch.arange(4.0), torch.arange(8.0)], 8)
    assert found.tolist() == [[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [2, 5], [3, 6], [3, 7]]


def test_an_edge_is_compared_with_its_siblings_by_hand():
    """Leaves 1 3 | 4 8 of a prompt: mean 4, deviation sqrt(26/3). The first edges have means 2 and 6, so -2 and +2 against
    the prompt; the leaves differ from them by -1, 1, -2, 2."""
    scores = edge_scores(torch.tensor([1.0, 3.0, 4.0, 8.0]), ["a"] * 4, tree=TWO_BY_TWO)
    unit = math.sqrt(26 / 3)
    expected = [[-2 / unit, -1 / unit], [-2 / unit, 1 / unit], [2 / unit, -2 / unit], [2 / unit, 2 / unit]]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_the_first_edges_are_compared_as_the_images_are():
    """With a history of 0s the prompt's mean is 2, the group's stays 4: the baseline moves the first edges alone."""
    rewards, history = torch.tensor([1.0, 3.0, 4.0, 8.0]), [("a", 0.0)] * 4
    unit = torch.tensor([0.0] * 4 + [1.0, 3.0, 4.0, 8.0]).double().std().item()
    of_prompt = edge_scores(rewards, ["a"] * 4, history, tree=TWO_BY_TWO) * unit
    of_group = edge_scores(rewards, ["a"] * 4, history, tree=TWO_BY_TWO, num_siblings=4) * unit
    torch.testing.assert_close(of_prompt[:, 0], torch.tensor([0.0, 0.0, 4.0, 4.0]))
    torch.testing.assert_close(of_group[:, 0], torch.tensor([-2.0, -2.0, 2.0, 2.0]))
    assert torch.equal(of_prompt[:, 1], of_group[:, 1])


@pytest.mark.parametrize("num_siblings", [0, 12])
def test_the_edges_of_a_leaf_add_up_to_its_score(num_siblings):
    """Whatever the tree: what its edges are worth is what it is worth."""
    rewards, prompts = torch.randn(36, generator=torch.Generator().manual_seed(0)), ["a"] * 24 + ["b"] * 12
    leaf = normalise(rewards, prompts, [("b", 3.0)], num_siblings=num_siblings)
    for tree in (Tree((2, 3, 2), (1, 1)), Tree((3, 4), (2,)), Tree((12,))):
        edges = edge_scores(rewards, prompts, [("b", 3.0)], num_siblings=num_siblings, tree=tree)
        assert edges.shape == (36, tree.num_depths)
        torch.testing.assert_close(edges.sum(1), leaf)
    assert torch.equal(edges[:, 0], leaf)  # of one depth, to the bit


def test_siblings_that_do_not_differ_are_worth_nothing():
    """A group of equal rewards, and a prompt seen in one value alone: exactly 0, and no NaN."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7, 0.2])
    edges = edge_scores(rewards, ["a"] * 4 + ["b"] * 4, num_siblings=4, tree=TWO_BY_TWO)
    assert edges[:4].tolist() == [[0.0, 0.0]] * 4
    assert edges[4:6, 1].tolist() == [0.0, 0.0]
    assert edges[4:6, 0].max() < 0


def test_a_shared_edge_belongs_to_the_first_that_is_selected():
    """Of group 0 leaves 0, 1 and 3, of group 1 leaf 1: 0 and 1 share their first edge, and nobody shares over groups."""
    selected = [Selected(0, 1, 1.0), Selected(0, 0, -1.0), Selected(0, 3, 0.0), Selected(1, 1, 1.0)]
    assert owned_edges(selected, TWO_BY_TWO).tolist() == [[True, True], [False, True], [True, True], [True, True]]
    assert owned_edges(selected, Tree((4,))).tolist() == [[True]] * 4
    everything = [Selected(group, leaf, 0.0) for group in range(2) for leaf in range(6)]
    assert owned_edges(everything, Tree((2, 3), (3,))).sum(0).tolist() == [2 * 2, 2 * 6]
