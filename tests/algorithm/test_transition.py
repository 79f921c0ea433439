"""One step as a Gaussian: density, KL and leverage against torch.distributions and derivatives, windows that are refused,
and the rows of another kind of sampler in the same table."""

import math

import pytest
import torch
from schedulers import ours, stock, v1_4_table
from torch import Tensor

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.ddim import PREDICTION_TYPES
from b2diffurl.algorithm.transition import (
    Transitions,
    leverage,
    log_prob,
    put_together,
    require_stochastic,
    step_weights,
    transition,
    transition_kl,
)
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.window import Window


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (5, 4, 2, 3), (3, 7)])
def test_log_prob_is_the_mean_of_the_normal_log_density(shape):
    """log_prob is torch.distributions.Normal's log-density, averaged over all dimensions but the first."""
    generator = torch.Generator().manual_seed(0)
    x, mu = torch.randn(2, *shape, generator=generator)
    sigma = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=generator) + 0.1
    expected = torch.distributions.Normal(mu.double(), sigma.double()).log_prob(x.double()).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(x, mu, sigma).double(), expected, rtol=1e-6, atol=1e-6)


def test_log_prob_gradient_by_hand():
    """d log_prob / d mu = (x - mu) / (sigma^2 D)."""
    x, mu = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mu.requires_grad_()
    sigma = torch.tensor(0.3)
    log_prob(x, mu, sigma).sum().backward()
    torch.testing.assert_close(mu.grad, (x - mu.detach()) / (0.09 * 5))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (5, 4, 2, 3), (3, 7)])
def test_kl_is_the_mean_of_the_normal_kl(shape):
    """transition_kl is torch.distributions' KL divergence of the two normals, averaged over all dimensions but the first; of
    equal means it is exactly 0, and so is its gradient."""
    generator = torch.Generator().manual_seed(0)
    mu, mu_ref = torch.randn(2, *shape, generator=generator)
    sigma = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=generator) + 0.1
    normals = [torch.distributions.Normal(mean.double(), sigma.double()) for mean in (mu, mu_ref)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(transition_kl(mu, mu_ref, sigma).double(), expected, rtol=1e-6, atol=0)
    same = mu.clone().requires_grad_()
    kl = transition_kl(same, mu, sigma)
    assert torch.equal(kl, torch.zeros(shape[0]))
    assert not torch.autograd.grad(kl.sum(), same)[0].any()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_leverage_is_the_derivative_over_sigma(prediction_type):
    """leverage is |d mu / d output| / sigma, the derivative as autograd takes it at a random state."""
    table = v1_4_table(20, prediction_type)
    x_t, output = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(0))
    output.requires_grad_()
    mu, sigma = transition(table, torch.arange(20), x_t, output)
    (derivative,) = torch.autograd.grad(mu.sum(), output)
    torch.testing.assert_close(leverage(table), (derivative.abs() / sigma).flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("num_steps", "last", "timestep"), [(20, 5.4, 51), (10, 8.3, 101)])
def test_leverage_of_stable_diffusion(num_steps, last, timestep):
    """At 20 steps the transition from t = 51 has a leverage of 5.4, at 10 steps that from t = 101 one of 8.3; the
    others of 20 steps have 0.6 to 1.1."""
    table = v1_4_table(num_steps)
    by_timestep = dict(zip(table.timesteps.tolist(), leverage(table).tolist(), strict=True))
    assert round(by_timestep.pop(timestep), 1) == last
    if num_steps == 20:
        assert 0.55 < min(by_timestep.values()) < max(by_timestep.values()) < 1.15


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_trained_steps", [1, 6, 20])
def test_leverage_weights_level_the_steps(prediction_type, num_trained_steps):
    """`leverage` weights times leverage is the same for each trained step, `sigma` weights are in proportion to sigma, and
    the mean weight is 1; `none` is all ones."""
    table = v1_4_table(20, prediction_type)
    window = Window.last(num_trained_steps, 20)
    weights = step_weights(table, window, "leverage")
    products = weights * leverage(table)[-num_trained_steps:]
    torch.testing.assert_close(products, products[:1].expand(num_trained_steps))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert torch.equal(step_weights(table, window, "none"), torch.ones(num_trained_steps))
    by_sigma = step_weights(table, window, "sigma") / table.sigma[-num_trained_steps:]
    torch.testing.assert_close(by_sigma, by_sigma[:1].expand(num_trained_steps))
    torch.testing.assert_close(step_weights(table, window, "sigma").mean(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="none, leverage, sigma"):
        step_weights(table, window, "both")


def test_stable_diffusion_window_is_stochastic():
    """With v1.4's scheduler every transition has sigma > 0 for 1..T trained steps, and a window beyond T is refused."""
    table = v1_4_table(20)
    assert (table.sigma > 0).all()
    for steps in range(1, 21):
        require_stochastic(table, Window.last(steps, 20))
    with pytest.raises(ValueError, match=r"\[19, 21\) must lie in 0\.\.20"):
        require_stochastic(table, Window(19, 21))


@pytest.mark.parametrize(
    ("config", "eta", "frozen"),
    [({}, 0.0, 951), ({"steps_offset": 0}, 1.0, 0), ({"set_alpha_to_one": True}, 1.0, 1)],
    ids=["eta 0", "a last step at t = 0", "set_alpha_to_one"],
)
def test_deterministic_transitions_are_refused(config, eta, frozen):
    """A window in which a computed sigma is 0 is refused, and the error names the timestep."""
    table = ours(stock(20, **config), eta)
    with pytest.raises(ValueError, match=rf"\b{frozen}\b.*sigma = 0"):
        require_stochastic(table, Window(0, 20))


def test_a_deterministic_transition_before_the_window_is_allowed():
    """Only trained transitions need a density."""
    table = v1_4_table(4)
    table.sigma[0] = 0
    require_stochastic(table, Window(1, 4))
    with pytest.raises(ValueError, match="751"):
        require_stochastic(table, Window(0, 4))


def flow_matching() -> Transitions:
    """Three steps of the SDE of a rectified flow (arXiv 2505.05470, noise level 1), from t = 3/4 by quarters to 0, worked by
    hand: a = 1 - d s^2 / 2t, b = -d (1 + s^2 (1 - t) / 2t), sigma = s sqrt(d), with s^2 = t / (1 - t) and d = 1/4."""
    timesteps = torch.tensor([0.75, 0.5, 0.25])
    a, b = torch.tensor([1 / 2, 3 / 4, 5 / 6]), torch.tensor([-3 / 8, -3 / 8, -3 / 8])
    return Transitions(timesteps, a, b, torch.tensor([3 / 4, 1 / 4, 1 / 12]).sqrt())


def test_a_flow_is_rows_of_the_same_table():
    """Fractional timesteps and a velocity as output: mean, deviation, density, KL, leverage and weights are what the SDE
    written out says, and branches are sampled from it, without any of them asking which sampler it is."""
    table = flow_matching()
    generator = torch.Generator().manual_seed(0)
    x_t, velocity, base_velocity, noise = torch.randn(4, 3, 2, 4, 4, generator=generator)
    t, step = table.timesteps.view(-1, 1, 1, 1), -0.25
    s = (t / (1 - t)).sqrt()
    drift, base_drift = (v + s**2 / (2 * t) * (x_t + (1 - t) * v) for v in (velocity, base_velocity))
    steps = torch.arange(3)
    mu, sigma = transition(table, steps, x_t, velocity)
    mu_base, _ = transition(table, steps, x_t, base_velocity)
    normals = [torch.distributions.Normal(x_t + one * step, s * 0.25**0.5) for one in (drift, base_drift)]
    torch.testing.assert_close(mu, normals[0].mean)
    torch.testing.assert_close(sigma.expand_as(mu), normals[0].stddev)
    x_prev = mu + sigma * noise
    torch.testing.assert_close(log_prob(x_prev, mu, sigma), normals[0].log_prob(x_prev).flatten(1).mean(1))
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(transition_kl(mu, mu_base, sigma), expected)

    torch.testing.assert_close(leverage(table), torch.tensor([3**0.5 / 4, 3 / 4, 3 * 3**0.5 / 4]))
    torch.testing.assert_close(step_weights(table, Window(1, 3), "leverage"), torch.tensor([3**0.5, 1]) * 2 / (3**0.5 + 1))
    torch.testing.assert_close(step_weights(table, Window(1, 3), "sigma"), torch.tensor([3**0.5, 1]) * 2 / (3**0.5 + 1))
    require_stochastic(table, Window(0, 3))
    silent = Transitions(table.timesteps, table.a, table.b, torch.zeros(3))
    still = put_together(silent, table, table.rows(3, 3), Window(1, 3))
    require_stochastic(still, Window(1, 3))
    with pytest.raises(ValueError, match=r"t = \[0\.75\] have sigma = 0"):
        require_stochastic(still, Window(0, 3))

    asked = []

    def predict(x: Tensor, i: int) -> Tensor:
        asked.append(table.timesteps[i].item())
        return x

    x_T = torch.zeros(2, 1, 2, 2)
    latents, log_probs, _ = branch_sample(predict, table, x_T, torch.ones, tree=Tree((3,)), window=Window(1, 3))
    x = [(3 / 4) ** 0.5]  # noise of one each time: x <- (a + b) x + sigma
    x.append((3 / 4 - 3 / 8) * x[0] + 1 / 2)
    x.append((5 / 6 - 3 / 8) * x[1] + (1 / 12) ** 0.5)
    torch.testing.assert_close(latents, torch.tensor(x).view(1, 1, 3, 1, 1, 1).expand(2, 3, 3, 1, 2, 2))
    density = -0.5 - torch.tensor([1 / 4, 1 / 12]).log() / 2 - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_probs, density.expand(2, 3, 2))
    assert asked == [0.75, 0.5, 0.25]
