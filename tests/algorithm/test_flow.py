"""Flow matching's transitions against numbers worked out by hand and stock diffusers, and what they do to the noise in x."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from b2diffurl.algorithm.flow import SDES, make_noise_levels, make_transitions
from b2diffurl.algorithm.transition import Transitions, require_stochastic, transition
from b2diffurl.algorithm.window import Window


def between(*sigmas: float, eta: float, sde: str) -> Transitions:
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return make_transitions(1000 * sigmas[:-1], sigmas, eta=eta, sde=sde)


def stock(num_steps: int, **config) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_it_is_the_step_of_diffusers(sde, shift):
    """The deterministic ODE, the same for each kind."""
    generator = torch.Generator().manual_seed(0)
    for num_steps in (1, 2, 10, 28, 1000):
        scheduler = stock(num_steps, shift=shift)
        table = make_transitions(scheduler.timesteps, scheduler.sigmas, eta=0.0, sde=sde)
        assert torch.equal(table.timesteps, scheduler.timesteps)
        x, output = torch.randn(2, num_steps, 3, 4, generator=generator)
        mu, sigma = transition(table, torch.arange(num_steps), x, output)
        expected = [scheduler.step(v, t, one).prev_sample for v, t, one in zip(output, scheduler.timesteps, x, strict=True)]
        assert not sigma.any()
        torch.testing.assert_close(mu, torch.stack(expected), rtol=3e-7, atol=6e-7)


def test_cps_of_new_noise_alone_is_the_stochastic_step_of_diffusers():
    """At eta 1 nothing of the old noise is kept: diffusers' `stochastic_sampling`."""
    scheduler = stock(10, shift=3.0, stochastic_sampling=True)
    table = make_transitions(scheduler.timesteps, scheduler.sigmas, eta=1.0, sde="cps")
    x, output = torch.randn(2, 10, 3, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
        expected = scheduler.step(output[i], t, x[i], generator=torch.Generator().manual_seed(i)).prev_sample
        mu, sigma = transition(table, i, x[i : i + 1], output[i : i + 1])
        torch.testing.assert_close((mu + sigma * noise)[0], expected, rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize(
    ("sde", "eta", "here", "there", "a", "b", "sigma"),
    [
        # mean 0.5 x̂_0 + 0.5 cos(pi/4) ε̂
        ("cps", 0.5, 0.8, 0.5, 0.5 + 0.35355339, -0.4 + 0.2 * 0.35355339, 0.35355339),
        # s^2 = 0.49 * 4, dt = -0.3: mean x + [v + 1.225 ε̂] dt
        ("flow", 0.7, 0.8, 0.5, 1 - 1.225 * 0.3, -0.3 * (1 + 1.225 * 0.2), 1.4 * math.sqrt(0.3)),
        # at sigma 1 the next one, 0.8, stands in the denominator: s^2 = 0.25 / 0.2
        ("flow", 0.5, 1.0, 0.8, 1 - 0.625 * 0.2, -0.2, math.sqrt(0.25)),
        # the last step: s^2 = 0.25 * 0.25 / 0.75
        ("flow", 0.5, 0.25, 0.0, 1 - 1 / 24, -0.25 * (1 + 0.75 / 6), math.sqrt(0.25 / 12)),
        # s^2 = 0.09: mean x + [v + 0.1125 ε̂] dt
        ("dance", 0.3, 0.4, 0.3, 1 - 0.01125, -0.1 * (1 + 0.1125 * 0.6), 0.3 * math.sqrt(0.1)),
    ],
)
def test_a_step_by_hand(sde, eta, here, there, a, b, sigma):
    table = between(here, there, eta=eta, sde=sde)
    found = [column.item() for column in table.columns]
    assert found == pytest.approx([1000 * here, a, b, sigma], rel=1e-6)
    assert {column.dtype for column in table.columns} == {torch.float32}


def noise_after(table: Transitions, sigmas: list[float]) -> Tensor:
    """The deviation of x after each step, [T], if x before it is of the forward process and the network knows x_0 and eps.

    Its mean, which must be (1 - sigma') x_0, is looked at on the way.
    """
    x_0, eps = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])  # the mean's parts in x_0 and in eps
    found = []
    for i, (here, there) in enumerate(pairwise(sigmas)):
        (clean, kept), sigma = transition(table, i, (1 - here) * x_0 + here * eps, eps - x_0)
        assert clean.item() == pytest.approx(2 * (1 - there), abs=1e-5)
        found.append((kept**2 + sigma.squeeze() ** 2).sqrt())
    return torch.stack(found)


@pytest.mark.parametrize("eta", [0.001, 0.4, 0.7, 1.0])
def test_cps_keeps_the_noise_that_the_network_expects(eta):
    sigmas = [1.0, 0.9, 0.75, 0.3, 0.01, 0.0]
    table = between(*sigmas, eta=eta, sde="cps")
    torch.testing.assert_close(noise_after(table, sigmas), torch.tensor(sigmas[1:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sde", ["flow", "dance"])
@pytest.mark.parametrize("dt", [0.04, 0.01])
def test_the_other_sdes_keep_it_up_to_the_square_of_the_step(sde, dt):
    """Their steps are Euler's. With u = s^2 / sigma the variance is sigma'^2 and (u + u^2 / 4) dt^2 too much."""
    sigma = 0.6
    table = between(sigma, sigma - dt, eta=0.5, sde=sde)
    error = (noise_after(table, [sigma, sigma - dt]).double() ** 2).item() - (sigma - dt) ** 2
    u = 0.25 * (1.5 if sde == "flow" else 1) / sigma
    assert error == pytest.approx((u + u**2 / 4) * dt**2, rel=0.02)


def test_the_last_step_of_cps_has_no_noise():
    """A window may end before it. The other kinds have noise to the end."""
    scheduler = stock(8, shift=3.0)
    for sde in SDES:
        table = make_transitions(scheduler.timesteps, scheduler.sigmas, eta=0.7, sde=sde)
        assert (table.sigma > 0).tolist() == [True] * 7 + [sde != "cps"]
        require_stochastic(table, Window(0, 7))
    with pytest.raises(ValueError, match="sigma = 0"):
        require_stochastic(make_transitions(scheduler.timesteps, scheduler.sigmas, eta=0.7, sde="cps"), Window(4, 8))


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match="'ode'; known: cps, flow, dance"):
        between(1.0, 0.0, eta=1.0, sde="ode")


def test_the_forward_process_is_that_of_diffusers():
    """x_sigma is `scale_noise`. A network that outputs the target is led by diffusers' step to x_0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = make_noise_levels(scheduler.timesteps.flip(0), scheduler.sigmas.flip(0))
    x_0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0, 300, 777, 999])
    x_t, target = levels.x_t(level, x_0, eps), levels.target(level, x_0, eps)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x_0, levels.timesteps[level], eps))
    assert torch.equal(target, eps - x_0)
    sigma = levels.timesteps[level] / 1000
    torch.testing.assert_close(x_t - sigma.view(-1, 1, 1, 1) * target, x_0, rtol=0, atol=2e-6)
    torch.testing.assert_close(levels.gain[level], sigma)
