"""The scores of several rewards as one, and how much of it is whose."""

import math

import pytest
import torch

from b2diffurl.algorithm.advantages import correlation, normalise, weigh

PROMPTS = ["a", "b"] * 20


def draw(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(seed))


def mixed(x: torch.Tensor, y: torch.Tensor, weights=(1.0, 0.5)) -> torch.Tensor:
    """Each normalised by itself, then weighed."""
    return weigh([normalise(rewards, PROMPTS) for rewards in (x, y)], weights)


def test_weighed_by_hand():
    """Weights 3 and 4 have the root of their squares 5; a negative weight turns its reward around."""
    scores = [torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 1.0, 0.5])]
    assert weigh(scores, [3.0, 4.0]).tolist() == pytest.approx([7 / 5, 4 / 5, -4 / 5])
    assert weigh(scores, [3.0, -4.0]).tolist() == pytest.approx([-1 / 5, -4 / 5, -8 / 5])


@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-6, 1e6])
def test_one_reward_keeps_its_scores(weight):
    """Every bit of them, the sign of a zero too; turned around by a negative weight."""
    scores = torch.cat([normalise(draw(), PROMPTS), torch.tensor([-0.0, 0.0])])
    assert torch.equal(weigh([scores], [weight]).view(torch.int32), scores.view(torch.int32))
    assert torch.equal(weigh([scores], [-weight]), -scores)


def test_a_rewards_unit_does_not_matter():
    """In thousandths or shifted a reward has the scores it had, of which the weighted sum's would be another's alone."""
    x, y = draw(), draw(1)
    torch.testing.assert_close(mixed(1000 * x + 7, y), mixed(x, y), rtol=0, atol=1e-5)
    assert torch.equal(mixed(1024 * x, y), mixed(x, y))  # to the bit, as a power of 2 rounds nothing
    of_sum, of_larger = normalise(x + 0.5 * y, PROMPTS), normalise(1000 * x + 0.5 * y, PROMPTS)
    assert (of_larger - of_sum).abs().max() > 0.5
    torch.testing.assert_close(of_larger, normalise(x, PROMPTS), rtol=0, atol=1e-2)


def test_only_the_ratio_of_weights_matters():
    """Ten times both weights is nothing, ten times one of them is something."""
    x, y = draw(), draw(1)
    torch.testing.assert_close(mixed(x, y, (10.0, 5.0)), mixed(x, y), rtol=0, atol=1e-6)
    assert (mixed(x, y, (10.0, 0.5)) - mixed(x, y)).abs().max() > 0.1


def test_rewards_that_do_not_correlate_have_the_spread_of_one():
    """Whatever the weights: mean square 1, of 20,000 draws within four standard errors, sqrt(2 / 20,000) each."""
    scores = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    for weights in ([1.0, 1.0, 1.0], [3.0, -0.1, 20.0]):
        assert weigh(list(scores), weights).square().mean().item() == pytest.approx(1, abs=0.04)


def test_correlation_by_hand():
    """1 2 3 with 1 3 2: covariance 1/2 of deviations 1; a constant, even one that is no float, correlates with nothing."""
    x = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(x, torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert correlation(x, -2 * x + 5) == pytest.approx(-1)
    assert correlation(x, torch.zeros(3)) == correlation(torch.zeros(3), x) == 0
    assert math.isfinite(correlation(x[:1], x[:1]))
