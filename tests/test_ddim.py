"""The transition against stock diffusers, its density against torch.distributions, and the windows that are refused."""

import math

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from b2diffurl.algorithm.ddim import (
    PREDICTION_TYPES,
    Sampler,
    leverage,
    log_prob,
    make_sampler,
    require_stochastic,
    step_weights,
    transition,
    transition_kl,
)


def stock(num_steps: int, **config) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(tiny.V1_4_SCHEDULER | config)
    scheduler.set_timesteps(num_steps)
    return scheduler


def ours(scheduler: DDIMScheduler, eta: float) -> Sampler:
    return make_sampler(
        scheduler.timesteps,
        scheduler.alphas_cumprod,
        scheduler.final_alpha_cumprod,
        eta=eta,
        prediction_type=scheduler.config.prediction_type,
    )


def v1_4_sampler(num_steps: int, prediction_type: str = "epsilon") -> Sampler:
    return ours(stock(num_steps, prediction_type=prediction_type), 1.0)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_transition_equals_diffusers_at_every_timestep(prediction_type, eta, set_alpha_to_one):
    """mu + sigma * noise is DDIMScheduler.step with that noise, at each of the 1,000 timesteps and on usual grids.

    The reference is stock code in float64, from which our float32 may differ by rounding only.
    """
    generator = torch.Generator().manual_seed(0)
    for num_steps, steps_offset in [(1000, 0), (20, 1), (10, 1), (7, 1)]:
        scheduler = stock(
            num_steps, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset
        )
        sampler = ours(scheduler, eta)
        x_t, output, noise = torch.randn(3, num_steps, 2, 3, generator=generator)
        mu, sigma = transition(sampler, torch.arange(num_steps), x_t, output)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        expected = torch.stack(
            [
                scheduler.step(o, t, x, eta=eta, variance_noise=n).prev_sample
                for t, x, o, n in zip(scheduler.timesteps, x_t.double(), output.double(), noise.double(), strict=True)
            ]
        )
        assert mu.dtype == sigma.dtype == torch.float32
        torch.testing.assert_close((mu + sigma.view(-1, 1, 1) * noise).double(), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_half_precision_inputs_do_not_lower_the_arithmetic(prediction_type):
    """Half-precision states and outputs give exactly what the same values give in float32."""
    sampler = v1_4_sampler(20, prediction_type)
    x_t, output = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    steps = torch.arange(20)
    for low, high in zip(
        transition(sampler, steps, x_t, output), transition(sampler, steps, x_t.float(), output.float()), strict=True
    ):
        assert low.dtype == torch.float32
        assert torch.equal(low, high)


def test_one_step_for_all_rows_equals_a_step_a_row():
    """The step index may be one number or one a row; the numbers are the same to the bit."""
    sampler = v1_4_sampler(20)
    x_t, output = torch.randn(2, 20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mu, sigma = transition(sampler, torch.arange(20), x_t, output)
    for i in range(20):
        one_mu, one_sigma = transition(sampler, i, x_t[i : i + 1], output[i : i + 1])
        assert torch.equal(one_mu[0], mu[i])
        assert torch.equal(one_sigma.flatten(), sigma[i].flatten())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_each_step_leads_to_the_next_timestep_of_the_list(spacing):
    """Whatever the spacing, a step lands on the schedule's real next timestep, and the last on the final value."""
    scheduler = stock(15, timestep_spacing=spacing)
    sampler = ours(scheduler, 1.0)
    table = scheduler.alphas_cumprod
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    assert torch.equal(sampler.alpha_bar, table[scheduler.timesteps.long()])
    assert torch.equal(sampler.alpha_bar_prev[:-1], table[scheduler.timesteps.long()[1:]])
    assert sampler.alpha_bar_prev[-1] == table[0]


def test_sigma_by_hand():
    """Equation 16 worked by hand: alpha_bar 0.2 -> 0.5 -> 0.8 gives 0.6124 and 0.3873, and eta scales it."""
    table = torch.tensor([0.8, 0.5, 0.2])
    for eta in (1.0, 0.5):
        sampler = make_sampler(torch.tensor([2, 1]), table, 0.8, eta=eta, prediction_type="epsilon")
        by_hand = [eta * math.sqrt(0.5 / 0.8 * (1 - 0.2 / 0.5)), eta * math.sqrt(0.2 / 0.5 * (1 - 0.5 / 0.8))]
        torch.testing.assert_close(sampler.sigma, torch.tensor(by_hand))


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
    sampler = v1_4_sampler(20, prediction_type)
    x_t, output = torch.randn(2, 20, 1, generator=torch.Generator().manual_seed(0))
    output.requires_grad_()
    mu, sigma = transition(sampler, torch.arange(20), x_t, output)
    (derivative,) = torch.autograd.grad(mu.sum(), output)
    torch.testing.assert_close(leverage(sampler), (derivative.abs() / sigma).flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_steps", "last", "timestep"), [(20, 5.4, 51), (10, 8.3, 101)])
def test_leverage_of_stable_diffusion(num_steps, last, timestep):
    """At 20 steps the transition from t = 51 has a leverage of 5.4, at 10 steps that from t = 101 one of 8.3; the
    others of 20 steps have 0.6 to 1.1."""
    sampler = v1_4_sampler(num_steps)
    by_timestep = dict(zip(sampler.timesteps.tolist(), leverage(sampler).tolist(), strict=True))
    assert round(by_timestep.pop(timestep), 1) == last
    if num_steps == 20:
        assert 0.55 < min(by_timestep.values()) < max(by_timestep.values()) < 1.15


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_trained_steps", [1, 6, 20])
def test_leverage_weights_level_the_steps(prediction_type, num_trained_steps):
    """`leverage` weights times leverage is the same for each trained step, `sigma` weights are in proportion to sigma, and
    the mean weight is 1; `none` is all ones."""
    sampler = v1_4_sampler(20, prediction_type)
    weights = step_weights(sampler, num_trained_steps, "leverage")
    products = weights * leverage(sampler)[-num_trained_steps:]
    torch.testing.assert_close(products, products[:1].expand(num_trained_steps))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert torch.equal(step_weights(sampler, num_trained_steps, "none"), torch.ones(num_trained_steps))
    by_sigma = step_weights(sampler, num_trained_steps, "sigma") / sampler.sigma[-num_trained_steps:]
    torch.testing.assert_close(by_sigma, by_sigma[:1].expand(num_trained_steps))
    torch.testing.assert_close(step_weights(sampler, num_trained_steps, "sigma").mean(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="none, leverage, sigma"):
        step_weights(sampler, num_trained_steps, "both")


def test_stable_diffusion_window_is_stochastic():
    """With v1.4's scheduler every transition has sigma > 0 for 1..T trained steps, and other S are refused."""
    sampler = v1_4_sampler(20)
    assert (sampler.sigma > 0).all()
    for steps in range(1, 21):
        require_stochastic(sampler, steps)
    for steps in (0, -1, 21):
        with pytest.raises(ValueError, match=r"1\.\.20"):
            require_stochastic(sampler, steps)


@pytest.mark.parametrize(
    ("config", "eta", "frozen"),
    [({}, 0.0, 951), ({"steps_offset": 0}, 1.0, 0), ({"set_alpha_to_one": True}, 1.0, 1)],
    ids=["eta 0", "a last step at t = 0", "set_alpha_to_one"],
)
def test_deterministic_transitions_are_refused(config, eta, frozen):
    """A window in which a computed sigma is 0 is refused, and the error names the timestep."""
    sampler = ours(stock(20, **config), eta)
    with pytest.raises(ValueError, match=rf"\b{frozen}\b.*sigma = 0"):
        require_stochastic(sampler, 20)


def test_a_deterministic_transition_before_the_window_is_allowed():
    """Only trained transitions need a density."""
    sampler = v1_4_sampler(4)
    sampler.sigma[0] = 0
    require_stochastic(sampler, 3)
    with pytest.raises(ValueError, match="751"):
        require_stochastic(sampler, 4)


def test_unknown_prediction_type_lists_the_choices():
    """A ValueError names epsilon, v_prediction and sample."""
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        make_sampler(torch.tensor([1]), torch.ones(2), 1.0, eta=1.0, prediction_type="flow")
