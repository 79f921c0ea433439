"""The objectives against PPO's formula written out case by case, and against the plain policy gradient."""

import math

import pytest
import torch

from b2diffurl.objectives import OBJECTIVES
from b2diffurl.objectives.ddpo import ddpo

CLIP = 0.1


def at(ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, gradient by log_prob and clip flag of one pair whose probability ratio is `ratio`."""
    log_prob = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, metrics = ddpo(log_prob, torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage]), clip_range=CLIP)
    loss.sum().backward()
    return loss.item(), log_prob.grad.item(), metrics["clipped"].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.00, 2.0, -2.0, -2.0, 0),  # at the old policy: the plain policy gradient
        (1.05, 2.0, -2.1, -2.1, 0),  # inside the range: weighted by the ratio
        (1.20, 2.0, -2.2, 0.0, 1),  # a good action made likely enough: no more push
        (0.80, 2.0, -1.6, -1.6, 0),  # a good action made unlikely: pushed back however far
        (1.00, -2.0, 2.0, 2.0, 0),
        (0.95, -2.0, 1.9, 1.9, 0),
        (0.80, -2.0, 1.8, 0.0, 1),  # a bad action made unlikely enough
        (1.20, -2.0, 2.4, 2.4, 0),  # a bad action made likely: pushed back however far
        (1.20, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient, clipped):
    """-min(ratio A, clip(ratio) A), its derivative by log_prob, and whether the clip cut that derivative."""
    assert at(ratio, advantage) == pytest.approx((loss, gradient, clipped))


def test_gradient_at_the_old_policy_is_reinforce():
    """At ratio 1 the gradient is that of -A log p for every pair, whatever the clip range."""
    old, advantage = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for clip_range in (1e-4, 0.1, 0.5):
        log_prob = old.clone().requires_grad_()
        loss, metrics = ddpo(log_prob, old, advantage, clip_range=clip_range)
        (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
        torch.testing.assert_close(gradient, -advantage)
        assert torch.equal(metrics["log_ratio"], torch.zeros(50))
        assert torch.equal(metrics["clipped"], torch.zeros(50))


def test_the_loss_bounds_the_surrogate_from_above():
    """PPO's objective is pessimistic: the loss is never below -ratio A."""
    log_prob, old, advantage = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    loss, metrics = ddpo(log_prob, old, advantage, clip_range=CLIP)
    assert (loss >= -advantage * (log_prob - old).exp()).all()
    assert 0 < metrics["clipped"].mean() < 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_share_one_signature(name):
    """(log_prob [N], old_log_prob [N], advantage [N], clip_range) -> loss [N] and detached metrics [N]; pairs are
    independent of each other."""
    log_prob, old, advantage = 0.1 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    log_prob.requires_grad_()
    loss, metrics = OBJECTIVES[name](log_prob, old, advantage, clip_range=CLIP)
    assert loss.shape == (6,)
    assert {"log_ratio", "clipped"} <= metrics.keys()
    assert all(value.shape == (6,) and not value.requires_grad for value in metrics.values())
    alone = [
        OBJECTIVES[name](log_prob[n : n + 1], old[n : n + 1], advantage[n : n + 1], clip_range=CLIP)[0] for n in range(6)
    ]
    assert torch.equal(loss, torch.cat(alone))
