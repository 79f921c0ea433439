"""The transition against stock diffusers, its density against torch.distributions, and the windows that are refused; and the
same table with the rows of another kind of sampler."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import DDIMScheduler
from torch import Tensor

from b2diffurl.algorithm.branching import branch_sample
from b2diffurl.algorithm.ddim import PREDICTION_TYPES, make_transitions
from b2diffurl.algorithm.transition import (
    Transitions,
    leverage,
    log_prob,
    require_stochastic,
    step_weights,
    transition,
    transition_kl,
    with_prefix,
)
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import Model, family


def stock(num_steps: int, **config) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(tiny.V1_4_SCHEDULER | config)
    scheduler.set_timesteps(num_steps)
    return scheduler


def ours(scheduler: DDIMScheduler, eta: float) -> Transitions:
    return make_transitions(
        scheduler.timesteps,
        scheduler.alphas_cumprod,
        scheduler.final_alpha_cumprod,
        eta=eta,
        prediction_type=scheduler.config.prediction_type,
    )


def v1_4_table(num_steps: int, prediction_type: str = "epsilon") -> Transitions:
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
        table = ours(scheduler, eta)
        x_t, output, noise = torch.randn(3, num_steps, 2, 3, generator=generator)
        mu, sigma = transition(table, torch.arange(num_steps), x_t, output)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        expected = torch.stack(
            [
                scheduler.step(o, t, x, eta=eta, variance_noise=n).prev_sample
                for t, x, o, n in zip(scheduler.timesteps, x_t.double(), output.double(), noise.double(), strict=True)
            ]
        )
        assert mu.dtype == sigma.dtype == torch.float32
        torch.testing.assert_close((mu + sigma.view(-1, 1, 1) * noise).double(), expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_half_precision_inputs_do_not_lower_the_arithmetic(prediction_type):
    """Half-precision states and outputs give exactly what the same values give in float32."""
    table = v1_4_table(20, prediction_type)
    x_t, output = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    steps = torch.arange(20)
    for low, high in zip(
        transition(table, steps, x_t, output), transition(table, steps, x_t.float(), output.float()), strict=True
    ):
        assert low.dtype == torch.float32
        assert torch.equal(low, high)


def test_one_step_for_all_rows_equals_a_step_a_row():
    """The step index may be one number or one a row; the numbers are the same to the bit."""
    table = v1_4_table(20)
    x_t, output = torch.randn(2, 20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mu, sigma = transition(table, torch.arange(20), x_t, output)
    for i in range(20):
        one_mu, one_sigma = transition(table, i, x_t[i : i + 1], output[i : i + 1])
        assert torch.equal(one_mu[0], mu[i])
        assert torch.equal(one_sigma.flatten(), sigma[i].flatten())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_each_step_leads_to_the_next_timestep_of_the_list(spacing):
    """Whatever the spacing, a step lands on the schedule's real next timestep, and the last on the final value."""
    scheduler = stock(15, timestep_spacing=spacing)
    table, alphas_cumprod = ours(scheduler, 1.0), scheduler.alphas_cumprod.double()
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    alpha_bar = alphas_cumprod[scheduler.timesteps.long()]
    alpha_bar_prev = torch.cat([alphas_cumprod[scheduler.timesteps.long()[1:]], alphas_cumprod[:1]])
    assert torch.equal(table.a, (alpha_bar_prev.sqrt() / alpha_bar.sqrt()).float())
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    assert torch.equal(table.sigma, variance.sqrt().float())


def test_sigma_by_hand():
    """Equation 16 worked by hand: alpha_bar 0.2 -> 0.5 -> 0.8 gives 0.6124 and 0.3873, and eta scales it."""
    for eta in (1.0, 0.5):
        alphas_cumprod = torch.tensor([0.8, 0.5, 0.2])
        table = make_transitions(torch.tensor([2, 1]), alphas_cumprod, 0.8, eta=eta, prediction_type="epsilon")
        by_hand = [eta * math.sqrt(0.5 / 0.8 * (1 - 0.2 / 0.5)), eta * math.sqrt(0.2 / 0.5 * (1 - 0.5 / 0.8))]
        torch.testing.assert_close(table.sigma, torch.tensor(by_hand))


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
    weights = step_weights(table, num_trained_steps, "leverage")
    products = weights * leverage(table)[-num_trained_steps:]
    torch.testing.assert_close(products, products[:1].expand(num_trained_steps))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert torch.equal(step_weights(table, num_trained_steps, "none"), torch.ones(num_trained_steps))
    by_sigma = step_weights(table, num_trained_steps, "sigma") / table.sigma[-num_trained_steps:]
    torch.testing.assert_close(by_sigma, by_sigma[:1].expand(num_trained_steps))
    torch.testing.assert_close(step_weights(table, num_trained_steps, "sigma").mean(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="none, leverage, sigma"):
        step_weights(table, num_trained_steps, "both")


def test_stable_diffusion_window_is_stochastic():
    """With v1.4's scheduler every transition has sigma > 0 for 1..T trained steps, and other S are refused."""
    table = v1_4_table(20)
    assert (table.sigma > 0).all()
    for steps in range(1, 21):
        require_stochastic(table, steps)
    for steps in (0, -1, 21):
        with pytest.raises(ValueError, match=r"1\.\.20"):
            require_stochastic(table, steps)


@pytest.mark.parametrize(
    ("config", "eta", "frozen"),
    [({}, 0.0, 951), ({"steps_offset": 0}, 1.0, 0), ({"set_alpha_to_one": True}, 1.0, 1)],
    ids=["eta 0", "a last step at t = 0", "set_alpha_to_one"],
)
def test_deterministic_transitions_are_refused(config, eta, frozen):
    """A window in which a computed sigma is 0 is refused, and the error names the timestep."""
    table = ours(stock(20, **config), eta)
    with pytest.raises(ValueError, match=rf"\b{frozen}\b.*sigma = 0"):
        require_stochastic(table, 20)


def test_a_deterministic_transition_before_the_window_is_allowed():
    """Only trained transitions need a density."""
    table = v1_4_table(4)
    table.sigma[0] = 0
    require_stochastic(table, 3)
    with pytest.raises(ValueError, match="751"):
        require_stochastic(table, 4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_prefix_of_another_eta_is_that_sampler_s_own(prediction_type):
    """with_prefix: before the last S steps a transition is DDIMScheduler.step with the prefix's eta, then with its own."""
    scheduler = stock(10, prediction_type=prediction_type)
    table = with_prefix(ours(scheduler, 1.0), ours(scheduler, 0.2), 4)
    x_t, output = torch.randn(2, 10, 2, 3, generator=torch.Generator().manual_seed(0))
    mu, sigma = transition(table, torch.arange(10), x_t, output)
    for i, t in enumerate(scheduler.timesteps):
        eta = 0.2 if i < 6 else 1.0
        steps = [
            scheduler.step(output[i], t, x_t[i], eta=eta, variance_noise=torch.full_like(x_t[i], value)).prev_sample
            for value in (0.0, 1.0)
        ]
        torch.testing.assert_close(mu[i], steps[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sigma[i].expand_as(x_t[i]), steps[1] - steps[0], rtol=1e-3, atol=1e-5)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()


# ---- a table of another kind ----


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
    torch.testing.assert_close(step_weights(table, 2, "leverage"), torch.tensor([3**0.5, 1]) * 2 / (3**0.5 + 1))
    torch.testing.assert_close(step_weights(table, 2, "sigma"), torch.tensor([3**0.5, 1]) * 2 / (3**0.5 + 1))
    require_stochastic(table, 3)
    still = with_prefix(table, Transitions(table.timesteps, table.a, table.b, torch.zeros(3)), 2)
    require_stochastic(still, 2)
    with pytest.raises(ValueError, match=r"t = \[0\.75\] have sigma = 0"):
        require_stochastic(still, 3)

    asked = []

    def predict(x: Tensor, i: int) -> Tensor:
        asked.append(table.timesteps[i].item())
        return x

    x_T = torch.zeros(2, 1, 2, 2)
    latents, log_probs = branch_sample(predict, table, x_T, torch.ones, num_branches=3, num_trained_steps=2)
    x = [(3 / 4) ** 0.5]  # noise of one each time: x <- (a + b) x + sigma
    x.append((3 / 4 - 3 / 8) * x[0] + 1 / 2)
    x.append((5 / 6 - 3 / 8) * x[1] + (1 / 12) ** 0.5)
    torch.testing.assert_close(latents, torch.tensor(x).view(1, 1, 3, 1, 1, 1).expand(2, 3, 3, 1, 2, 2))
    density = -0.5 - torch.tensor([1 / 4, 1 / 12]).log() / 2 - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_probs, density.expand(2, 3, 2))
    assert asked == [0.75, 0.5, 0.25]


def test_unknown_prediction_type_lists_the_choices():
    """A ValueError names epsilon, v_prediction and sample."""
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        make_transitions(torch.tensor([1]), torch.ones(2), 1.0, eta=1.0, prediction_type="flow")


# ---- rounding ----


def written_out(scheduler: DDIMScheduler, dtype: torch.dtype) -> Callable:
    """(i, x_t, output) -> mu, sigma: equation 12 at eta 1 by way of x_0, all its arithmetic in `dtype`, of epsilon."""
    alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
    alpha_bar_prev = torch.cat([alpha_bar[1:], scheduler.final_alpha_cumprod.double().view(1)])
    sigmas = ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
    columns = alpha_bar.to(dtype), alpha_bar_prev.to(dtype), sigmas.to(dtype)

    def step(i: int, x_t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        ab, ab_prev, sigma = (column[i].view(-1, *(1,) * (x_t.dim() - 1)) for column in columns)
        x_0 = (x_t.to(dtype) - (1 - ab).sqrt() * eps.to(dtype)) / ab.sqrt()
        return ab_prev.sqrt() * x_0 + (1 - ab_prev - sigma**2).clamp_min(0).sqrt() * eps.to(dtype), sigma

    return step


@pytest.mark.parametrize("num_steps", [10, 20, 1000])
def test_the_table_rounds_less_than_the_way_over_x_0(num_steps):
    """In float32, mu by a and b lies about twice as near to its float64 value as by equation 12 as it is written."""
    scheduler = stock(num_steps, steps_offset=0 if num_steps == 1000 else 1)
    table, steps = ours(scheduler, 1.0), torch.arange(num_steps)
    x_t, eps = torch.randn(2, num_steps, 4096, generator=torch.Generator().manual_seed(0))
    exact, _ = written_out(scheduler, torch.float64)(steps, x_t, eps)
    error, detour = (
        (mu.double() - exact).square().mean().sqrt()
        for mu in (transition(table, steps, x_t, eps)[0], written_out(scheduler, torch.float32)(steps, x_t, eps)[0])
    )
    print(f"\n{num_steps} steps: root mean square error of mu {error:.1e} by the table, {detour:.1e} by way of x_0")
    assert error < 0.65 * detour


def embedded_run(dtype: torch.dtype, make_step: Callable) -> dict[str, Tensor]:
    """Eight images of the embedded model in ten steps at eta 1 and guidance 2: their states and log-probs, and the first
    update's log-ratios and gradient; the network in `dtype`, and make_step(model) -> (i, x_t, output) -> mu, sigma."""
    base = ModelSettings("stable_diffusion", str(ROOT / "model/shapes/base"), "main", "", "", 0, lora_rank=4)
    model = family(base).load(base, device=torch.device("cpu"), dtype=torch.float32, seed=0, decoder=True)
    step, timesteps = make_step(model), model.sampler(10, 1.0).timesteps
    prompts = ["a red circle", "a blue square", "a green triangle", "a yellow circle above a red square"] * 2
    embeds = torch.cat([model.encode([""] * 8)["prompt_embeds"], model.encode(prompts)["prompt_embeds"]]).to(dtype)
    unet = model.unet.to(dtype)

    def policy(i: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        without, with_text = unet(torch.cat([x_t, x_t]), timesteps[i], embeds).sample.chunk(2)
        return step(i, x_t, without + 2.0 * (with_text - without))

    noise = torch.randn(11, 8, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(1)).to(dtype)
    states, log_probs, log_ratios = [noise[0]], [], []
    with torch.no_grad():
        for i in range(10):
            mu, sigma = policy(i, states[i])
            states.append(mu + sigma * noise[i + 1])
            log_probs.append(log_prob(states[i + 1], mu, sigma))
    for i in range(10):
        log_ratio = log_prob(states[i + 1], *policy(i, states[i])) - log_probs[i]
        log_ratios.append(log_ratio.detach())
        (-log_ratio.exp() * advantages).mean().div(10).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.trainable().values()])
    found = {"states": torch.stack(states), "log_probs": torch.stack(log_probs), "gradient": gradient}
    return found | {"log_ratios": torch.stack(log_ratios)}


def stock_of(model: Model) -> DDIMScheduler:
    scheduler = model.scheduler("DDIMScheduler")
    scheduler.set_timesteps(10)
    return scheduler


def test_rounding_on_the_embedded_model():
    """What the table moves by rounding, against the way over x_0 and against everything in float64; before the first update
    every ratio is 1 exactly. To see the figures: python -m pytest -s tests/algorithm/test_ddim.py -k rounding"""
    by_table = embedded_run(torch.float32, lambda model: partial(transition, model.sampler(10, 1.0)))
    over_x_0, exact = (
        embedded_run(dtype, lambda model, dtype=dtype: written_out(stock_of(model), dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert not by_table["log_ratios"].any()
    pairs = {"table, x_0": (by_table, over_x_0), "table, float64": (by_table, exact), "x_0, float64": (over_x_0, exact)}
    for which, (one, other) in pairs.items():
        for name in ("states", "log_probs", "gradient"):
            difference, norm = one[name].double() - other[name].double(), other[name].double().norm()
            relative = difference.norm() / norm
            print(f"\n{which}: {name} differ by at most {difference.abs().max():.1e}, by {relative:.1e} of the norm", end="")
            assert relative < 1e-5
