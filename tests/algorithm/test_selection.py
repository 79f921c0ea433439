"""Scores and contrast pairs on tables worked by hand."""

import math

import pytest
import torch

from b2diffurl.algorithm.advantages import advantages, normalise
from b2diffurl.algorithm.selection import Selected, contrast_pairs, select_all, select_pairs

PAIRS = {"pos_threshold": 0.5, "neg_threshold": -0.5}


def normalised(rewards: list[float], prompts: str, history=()) -> list[float]:
    return normalise(torch.tensor(rewards), list(prompts), history).tolist()


def test_scores_by_hand():
    """1, 2, 3 have mean 2 and (unbiased) deviation 1; each prompt is standardised on its own, in the order given."""
    assert normalised([1.0, 10.0, 2.0, 30.0, 3.0], "ababa") == pytest.approx(
        [-1.0, -math.sqrt(0.5), 0.0, math.sqrt(0.5), 1.0]
    )


def test_history_joins_mean_and_deviation_but_is_not_scored():
    """Today's 4 with 1, 2 and 3 of earlier stages: mean 2.5, deviation 1.291; another prompt's history does not count."""
    history = [("a", 1.0), ("b", 100.0), ("a", 2.0), ("a", 3.0)]
    assert normalised([4.0], "a", history) == pytest.approx([1.5 / math.sqrt(5 / 3)])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.37, 1e-8, 12345.678])
def test_equal_rewards_score_exactly_zero(value):
    """A prompt whose rewards are all equal scores 0, not rounding error divided by something tiny; nor NaN."""
    assert normalised([value] * 7, "aaaaaaa") == [0.0] * 7
    assert normalised([value] * 2, "aa", [("a", torch.tensor(value).item())] * 5) == [0.0] * 2


def test_a_prompt_seen_once_scores_zero():
    """One image of a prompt and no history: score 0 next to prompts that have scores."""
    assert normalised([0.7, 1.0, 3.0], "abb") == pytest.approx([0.0, -math.sqrt(0.5), math.sqrt(0.5)])


def test_a_prompt_seen_once_today_is_scored_against_its_history():
    """1 against an earlier 0: mean 0.5, deviation 0.7071."""
    assert normalised([1.0], "a", [("a", 0.0)]) == pytest.approx([math.sqrt(0.5)])


def test_small_spreads_on_a_large_mean_are_kept():
    """Rewards 1,000 apart by one thousandth (a dozen float32 ulps) have scores of order 1, computed in float64."""
    low, high = torch.tensor([1000.0, 1000.001]).tolist()
    assert normalised([low, high], "aa") == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_scores_relative_to_siblings_by_hand():
    """Two groups of one prompt, 0 0 1 and 1 1 1, with deviation sqrt(4/15): against 1/3 and 1, not against the prompt's 2/3.
    Siblings that do not differ score 0, and so are in no pair."""
    rewards = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    scores = normalise(rewards, ["a"] * 6, num_siblings=3)
    deviation = math.sqrt(4 / 15)
    assert scores.tolist() == pytest.approx([-1 / 3 / deviation] * 2 + [2 / 3 / deviation] + [0.0] * 3)
    assert [(one.group, one.branch) for one in select_pairs(scores.view(2, 3), **PAIRS)] == [(0, 2), (0, 0)]


def test_scores_relative_to_siblings_keep_the_scale_of_the_prompt():
    """Siblings that differ by a hundredth of their prompt's spread score hundredths, not +-1; equal rewards exactly 0."""
    rewards, history = torch.tensor([0.50, 0.51]), [("a", 0.0), ("a", 1.0)]
    scores = normalise(rewards, ["a", "a"], history, num_siblings=2)
    assert scores.abs().max() < 0.02
    assert scores[1] == -scores[0] > 0
    assert normalise(torch.full((4,), 0.1), ["a"] * 4, num_siblings=2).tolist() == [0.0] * 4


def test_pairs_by_hand():
    """Best if >= 0.5, worst if < -0.5: two, one, one and no trajectory from four groups."""
    scores = torch.tensor([[0.1, 1.5, -2.0], [0.9, 0.2, -0.4], [0.3, -0.7, 0.4], [0.4, -0.4, 0.0]])
    assert select_pairs(scores, **PAIRS) == [
        Selected(0, 1, pytest.approx(1.5)),
        Selected(0, 2, pytest.approx(-2.0)),
        Selected(1, 0, pytest.approx(0.9)),
        Selected(2, 1, pytest.approx(-0.7)),
    ]


def test_thresholds_at_their_very_value():
    """0.5 itself is kept as best, -0.5 itself is not kept as worst."""
    assert select_pairs(torch.tensor([[0.5, -0.5]]), **PAIRS) == [Selected(0, 0, 0.5)]
    just_below = -0.5 - 2**-20
    assert select_pairs(torch.tensor([[0.0, just_below]]), **PAIRS) == [Selected(0, 1, just_below)]


def test_ties_go_to_the_lowest_branch():
    """Of equal best and equal worst siblings the first is taken, and a group takes at most one of each."""
    scores = torch.tensor([[0.0, 2.0, -2.0, 2.0, -2.0], [1.0] * 5, [-1.0] * 5])
    assert select_pairs(scores, **PAIRS) == [
        Selected(0, 1, 2.0),
        Selected(0, 2, -2.0),
        Selected(1, 0, 1.0),
        Selected(2, 0, -1.0),
    ]


def test_all_by_hand():
    """Every trajectory with its own score, group by group."""
    assert select_all(torch.tensor([[0.5, -2.0], [0.0, 0.25]])) == [
        Selected(0, 0, 0.5),
        Selected(0, 1, -2.0),
        Selected(1, 0, 0.0),
        Selected(1, 1, 0.25),
    ]
    assert select_all(torch.zeros(3, 1)) == [Selected(group, 0, 0.0) for group in range(3)]


def test_contrast_pairs_by_hand():
    """Positions of best and worst of the groups that have both, best first; a group with one of them is left out."""
    scores = torch.tensor([[0.1, 1.5, -2.0], [0.9, 0.2, -0.4], [0.3, -0.7, 0.4], [0.4, -0.4, 0.0], [-3.0, 0.0, 3.0]])
    selected = select_pairs(scores, **PAIRS)
    assert [(one.group, one.branch) for one in selected] == [(0, 1), (0, 2), (1, 0), (2, 1), (4, 2), (4, 0)]
    assert contrast_pairs(selected) == [(0, 1), (4, 5)]
    assert contrast_pairs(selected[2:4]) == contrast_pairs([]) == []


def test_the_better_of_a_contrast_pair_comes_first():
    """Whatever the thresholds, the first of each pair is its group's maximum and the second its minimum."""
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    selected = select_pairs(scores, pos_threshold=0.3, neg_threshold=-0.2)
    pairs = contrast_pairs(selected)
    assert 0 < len(pairs) < 50
    for best, worst in pairs:
        row = scores[selected[best].group]
        assert (selected[best].score, selected[worst].score) == (row.max().item(), row.min().item())
        assert selected[best].group == selected[worst].group


def test_nothing_selected_is_an_empty_list():
    """No group beyond the thresholds: no trajectory, and no error downstream of it."""
    assert select_pairs(torch.zeros(4, 5), **PAIRS) == []
    assert advantages(torch.tensor([]), clip=5.0, positive_weight=1.0, negative_weight=1.0).tolist() == []


def test_selecting_twice_gives_the_same():
    """Normalising and selecting change nothing they are given."""
    rewards = torch.randn(30, generator=torch.Generator().manual_seed(0))
    prompts, history, before = ["a", "b"] * 15, [("a", 0.5)], rewards.clone()
    one, two = (select_pairs(normalise(rewards, prompts, history).unflatten(0, (-1, 5)), **PAIRS) for _ in range(2))
    assert one == two
    assert torch.equal(rewards, before)
    assert history == [("a", 0.5)]


def test_advantages_by_hand():
    """Scores are clamped to +-5 first and weighted after: beta1 where positive, beta2 elsewhere."""
    scores = torch.tensor([0.5, 7.0, 0.0, -1.0, -9.0])
    found = advantages(scores, clip=5.0, positive_weight=2.0, negative_weight=0.5)
    assert found.tolist() == [1.0, 10.0, 0.0, -0.5, -2.5]
