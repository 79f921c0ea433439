"""Distances between images of one prompt, against loops over pairs; and their effective number."""

import math
from itertools import combinations

import pytest
import torch

from b2diffurl.evaluation.diversity import inception_score, mean_pairwise_distance, vendi_score


def test_by_hand():
    """(0,0), (3,4), (0,8) are 5, 8 and 5 apart: mean 6; another prompt's pair is 1 apart and does not mix with them."""
    features = torch.tensor([[0.0, 0.0], [7.0, 7.0], [3.0, 4.0], [7.0, 8.0], [0.0, 8.0]])
    assert mean_pairwise_distance(features, list("abaca"), metric="euclidean") == {"a": pytest.approx(6.0)}
    assert mean_pairwise_distance(features, list("ababa"), metric="euclidean") == {
        "a": pytest.approx(6.0),
        "b": pytest.approx(1.0),
    }


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_against_a_loop_over_pairs(metric):
    """Random features of three prompts: the mean over pairs of torch's own distance, whatever the order of the rows."""
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    groups = ["abc"[n * n % 7 % 3] for n in range(30)]
    found = mean_pairwise_distance(features, groups, metric=metric)
    for group in "abc":
        rows = [row.double() for row, name in zip(features, groups, strict=True) if name == group]
        pairs = list(combinations(rows, 2))
        if metric == "cosine":
            distances = [1 - torch.cosine_similarity(a, b, dim=0) for a, b in pairs]
        else:
            distances = [torch.dist(a, b) for a, b in pairs]
        assert found[group] == pytest.approx(torch.stack(distances).mean().item(), rel=1e-9)


def test_the_length_of_an_embedding_does_not_count_for_cosine():
    """Opposite directions are 2 apart, equal ones of different length 0."""
    features = torch.tensor([[1.0, 0.0], [-5.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    found = mean_pairwise_distance(features, list("aabb"), metric="cosine")
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(0.0, abs=1e-12)}


def test_images_without_features_are_left_out():
    """A row with a NaN joins no pair; a prompt with fewer than two rows left has no diversity, not 0."""
    features = torch.tensor([[0.0], [math.nan], [2.0], [1.0], [math.nan]])
    assert mean_pairwise_distance(features, list("aaabb"), metric="euclidean") == {"a": pytest.approx(2.0)}
    assert mean_pairwise_distance(features[:0], [], metric="euclidean") == {}


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"'manhattan'.*euclidean, cosine"):
        mean_pairwise_distance(torch.zeros(2, 1), list("aa"), metric="manhattan")


@pytest.mark.parametrize(
    ("rows", "score"),
    [
        ([[1.0, 2.0]] * 5, 1.0),  # all alike
        ([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]], 1.0),  # alike but for their length, which does not count
        (torch.eye(4).tolist(), 4.0),  # nothing in common
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 3.0]], 2.0),  # two equal clusters
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 4 / 3**0.75),  # shares 3/4 and 1/4
        ([[1.0, 0.0], [0.5, 0.75**0.5]], 4 / 3**0.75),  # similarity 1/2: eigenvalues (1 +- 1/2) / 2, the same shares
    ],
)
def test_vendi_score_by_hand(rows, score):
    """exp of the entropy of the eigenvalues of the similarities over n."""
    assert vendi_score(torch.tensor(rows), ["a"] * len(rows)) == {"a": pytest.approx(score, rel=1e-6)}


def test_vendi_score_of_each_prompt():
    """Prompts do not mix, images without features are left out, and a prompt that has none left has no score; the order of
    the rows does not count."""
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [math.nan, 1.0], [3.0, 3.0], [math.inf, 0.0]])
    expected = {"a": pytest.approx(2.0), "b": pytest.approx(1.0)}
    assert vendi_score(features, list("ababbc")) == expected
    assert vendi_score(features.flip(0), list("cbbaba")) == expected
    assert vendi_score(features[:0], []) == {}
    assert vendi_score(features[:1], ["a"]) == inception_score(features[:1], ["a"]) == {}  # one image is no diversity


def test_inception_score_by_hand():
    """Sure of a class each: 2; all alike: 1; one sure and one torn between both: exp of H(3/4, 1/4) - H(1/2, 1/2) / 2."""
    sure, other, torn = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    probabilities = torch.tensor([sure, other, torn, torn, sure, torn, [math.nan, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert inception_score(probabilities, list("aabbccc")) == {
        "a": pytest.approx(2.0),
        "b": pytest.approx(1.0),
        "c": pytest.approx(math.exp(entropy)),
    }
