"""What people answer becomes scores, by hand; and what no answer can be is refused."""

import json
import math

import pytest
import torch

from b2diffurl.algorithm.advantages import normalise
from b2diffurl.algorithm.selection import select_pairs
from b2diffurl.labelling.votes import Votes


def answered(num_groups: int, num_siblings: int, *changes: dict) -> Votes:
    votes = Votes.none(num_groups, num_siblings)
    for change in changes:
        votes = votes.changed(change)
    return votes


def test_the_best_scores_1_the_worst_minus_1_and_the_others_0():
    """Three groups of four: picked, without a difference, picked the other way round."""
    votes = answered(3, 4, {"group": 2, "pick": [0, 3]}, {"group": 0, "pick": [3, 1]}, {"group": 1, "pick": []})
    assert votes.scores() == [0, -1, 0, 1, 0, 0, 0, 0, 1, 0, 0, -1]


def test_a_rating_is_the_score():
    """Of one image a group there is nothing to pick, so it begins with ratings."""
    assert answered(2, 1, {"image": 1, "rating": 5}, {"image": 0, "rating": 2}).scores() == [2, 5]
    both = answered(1, 2, {"group": 0, "pick": [0, 1]}, {"image": 0, "rating": 3}, {"image": 1, "rating": 4})
    assert both.scores() == [1, -1]
    assert both.changed({"mode": "rate"}).scores() == [3, 4]


def test_picks_are_the_same_relative_to_prompt_and_group():
    """The mean of a group's scores is 0, so `selection.advantage` does not matter. By hand: two groups of three, squares add
    up to 4, the deviation is sqrt(4/5), a best image scores 1.118."""
    votes = answered(2, 3, {"group": 0, "pick": [2, 0]}, {"group": 1, "pick": [0, 1]})
    rewards = torch.tensor(votes.scores(), dtype=torch.float32)
    to_prompt, to_group = (normalise(rewards, ["a"] * 6, num_siblings=siblings) for siblings in (0, 3))
    assert torch.equal(to_prompt, to_group)
    assert to_prompt.tolist() == pytest.approx(
        [-math.sqrt(5 / 4), 0, math.sqrt(5 / 4), math.sqrt(5 / 4), -math.sqrt(5 / 4), 0]
    )


def test_a_picked_pair_passes_the_thresholds_and_no_difference_teaches_nothing():
    """One group of two: 1 and -1 over their deviation, sqrt(2). Beside it a group without a difference."""
    votes = answered(2, 2, {"group": 0, "pick": [1, 0]}, {"group": 1, "pick": []})
    rewards = torch.tensor(votes.scores(), dtype=torch.float32)
    apart = normalise(rewards, ["a", "a", "b", "b"]).unflatten(0, (-1, 2))
    assert apart.tolist() == [pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)]), [0, 0]]
    chosen = select_pairs(apart, pos_threshold=0.5, neg_threshold=-0.5)
    assert [(one.group, one.branch) for one in chosen] == [(0, 1), (0, 0)]


def test_ratings_compare_the_groups_of_a_prompt():
    """All of one group bad, all of another good: relative to the prompt that is a difference, relative to the group none."""
    bad, good = ([{"image": n, "rating": rating} for n in ids] for ids, rating in ((range(2), 1), (range(2, 4), 5)))
    votes = answered(2, 2, {"mode": "rate"}, *bad, *good)
    rewards = torch.tensor(votes.scores(), dtype=torch.float32)
    assert normalise(rewards, ["a"] * 4).tolist() == pytest.approx([-math.sqrt(0.75)] * 2 + [math.sqrt(0.75)] * 2)
    assert normalise(rewards, ["a"] * 4, num_siblings=2).tolist() == [0] * 4


def test_what_is_open_has_no_scores():
    """Half a pick, a group without an answer, an image without a rating; an answer that is taken back."""
    votes = answered(3, 2, {"group": 0, "pick": [0, None]}, {"group": 1, "pick": [0, 1]}, {"group": 2, "pick": []})
    assert votes.open_groups == [0]
    with pytest.raises(ValueError, match="1 of 3 groups are still open"):
        votes.scores()
    assert votes.changed({"group": 0, "pick": [0, 1]}).open_groups == []
    assert votes.changed({"group": 2, "pick": None}).open_groups == [0, 2]
    rated = answered(2, 2, {"mode": "rate"}, *({"image": n, "rating": 1} for n in (0, 1, 3)))
    assert rated.open_groups == [1]
    assert rated.changed({"image": 0, "rating": None}).open_groups == [0, 1]


def test_another_answer_takes_the_place_of_the_first():
    votes = answered(1, 3, {"group": 0, "pick": []}, {"group": 0, "pick": [0, 1]}, {"group": 0, "pick": [2, 0]})
    assert votes.scores() == [-1, 0, 1]


def test_a_file_gives_back_what_was_answered():
    votes = answered(
        2, 3, {"group": 1, "pick": [None, 2]}, {"group": 0, "pick": []}, {"image": 4, "rating": 2}, {"mode": "rate"}
    )
    assert Votes.none(2, 3).read(json.loads(json.dumps(votes.to_json()))) == votes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group": 2, "pick": [0, 1]}, "group is 2; it must be a number from 0 to 1"),
        ({"group": -1, "pick": []}, "group is -1"),
        ({"group": True, "pick": []}, "group is True"),
        ({"group": "0", "pick": []}, "group is '0'"),
        ({"group": 0, "pick": [0, 3]}, "picked image is 3; it must be a number from 0 to 2"),
        ({"group": 0, "pick": [1, 1]}, "best and worst must be two images"),
        ({"group": 0, "pick": [None, None]}, "best and worst must be two images"),
        ({"group": 0, "pick": [1]}, r"pick is \[1\]; it must be \[best, worst\]"),
        ({"group": 0, "pick": "01"}, "pick is '01'"),
        ({"group": 0, "pick": [0.0, 1.0]}, "picked image is 0.0"),
        ({"image": 6, "rating": 1}, "image is 6; it must be a number from 0 to 5"),
        ({"image": 0, "rating": 0}, "rating is 0; it must be a number from 1 to 5"),
        ({"image": 0, "rating": 6}, "rating is 6"),
        ({"image": 0, "rating": 1e400}, "rating is inf"),
        ({"mode": "guess"}, "mode is 'guess'; there are pick and rate"),
        ({"mode": ["pick"]}, "mode is"),
        ({"mode": "pick", "group": 0}, "is no answer"),
        ({}, "is no answer"),
        ([], "is no answer"),
        ({"group": "x" * 10_000, "pick": []}, "group is 'x+…"),
    ],
)  # fmt: skip
def test_what_no_answer_can_be(change, said):
    with pytest.raises(ValueError, match=said) as raised:
        Votes.none(2, 3).changed(change)
    assert len(str(raised.value)) < 300


def test_one_image_has_no_best():
    with pytest.raises(ValueError, match="can only be rated"):
        Votes.none(2, 1).changed({"mode": "pick"})
