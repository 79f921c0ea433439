"""The transition against stock diffusers, its density against torch.distributions, and the windows that are refused; and the
same table with the rows of another kind of sampler."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler
from schedulers import ours, stock, v1_4_table
from torch import Tensor

from b2diffurl.algorithm.ddim import PREDICTION_TYPES, make_transitions
from b2diffurl.algorithm.transition import (
    log_prob,
    put_together,
    transition,
)
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import LoraSettings, ModelSettings
from b2diffurl.models import Model, family
from b2diffurl.models.noise_schedule import make_table


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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_prefix_of_another_eta_is_that_sampler_s_own(prediction_type):
    """put_together: before the window a transition is DDIMScheduler.step with the prefix's eta, then with its own."""
    scheduler = stock(10, prediction_type=prediction_type)
    trained = ours(scheduler, 1.0)
    table = put_together(ours(scheduler, 0.2), trained, trained.rows(10, 10), Window(6, 10))
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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("num_steps", "at_most", "timesteps", "stock_steps"),
    [(10, 4, [701, 501, 301, 101], 5), (8, 3, [626, 376, 126], 4), (10, 0, [701, 601, 501, 401, 301, 201, 101, 1], 10)],
)
def test_a_deterministic_tail_is_stock_diffusers_with_fewer_steps(
    prediction_type, num_steps, at_most, timesteps, stock_steps
):
    """From where the window leads to the image: steps of a DDIMScheduler set to fewer, at the same timesteps."""
    scheduler = stock(num_steps, prediction_type=prediction_type)
    window = Window(0, 2)
    tail = make_table(scheduler, num_steps, 0.0, window.tail(num_steps, at_most))
    table = put_together(ours(scheduler, 1.0), ours(scheduler, 1.0), tail, window)
    assert table.timesteps[2:].tolist() == timesteps
    x = mine = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    fewer = stock(stock_steps, prediction_type=prediction_type)
    for i, t in enumerate(timesteps):
        mu, sigma = transition(table, 2 + i, mine, torch.sin(3 * mine))
        assert not sigma.any()
        mine, x = mu, fewer.step(torch.sin(3 * x), t, x, eta=0.0).prev_sample
    torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)


def test_a_tail_of_uneven_steps_by_hand():
    """Timesteps 701, 501, 201 of 701, 601, …, 1 and then the image: x_0 is kept, and its noise is scaled down."""
    scheduler = stock(10)
    tail = make_table(scheduler, 10, 0.0, Window(0, 2).tail(10, 3))
    assert tail.timesteps.tolist() == [701, 501, 201]
    alpha_bar = [scheduler.alphas_cumprod.double()[t] for t in (701, 501, 201, 0)]  # the last is final_alpha_cumprod
    x_0, eps = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = [ab.sqrt() * x_0 + (1 - ab).sqrt() * eps for ab in alpha_bar]
    for i in range(3):
        mu, _ = transition(tail, i, x_t[i][None], eps[None])
        torch.testing.assert_close(mu[0].double(), x_t[i + 1], rtol=1e-5, atol=1e-5)


def test_unknown_prediction_type_lists_the_choices():
    """A ValueError names epsilon, v_prediction and sample."""
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        make_transitions(torch.tensor([1]), torch.ones(2), 1.0, eta=1.0, prediction_type="flow")


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
    base = ModelSettings("stable_diffusion", str(ROOT / "model/shapes/base"), "main", "", "", 0, lora=LoraSettings(4))
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
    return model.scheduler("DDIMScheduler", 10)


@pytest.mark.long
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
