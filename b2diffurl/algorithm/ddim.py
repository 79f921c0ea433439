"""DDIM (Song et al. 2021, arXiv 2010.02502), for every prediction type: transitions (equations 12, 16), and noise levels."""

import torch
from torch import Tensor

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions, affine_table

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def make_transitions(
    timesteps: Tensor, alphas_cumprod: Tensor, final_alpha_bar: float, *, eta: float, prediction_type: str
) -> Transitions:
    """The table of DDIM's transitions at decreasing `timesteps` [T], with the sigma_t(eta) of equation 16.

    `alphas_cumprod` [num_train_timesteps] is the training schedule's alpha_bar. `final_alpha_bar` is alpha_bar after the
    last step. Each step leads to the next timestep of the list, whatever the spacing. An unknown `prediction_type` raises a
    ValueError.
    """
    timesteps = timesteps.long().cpu()
    alpha_bar = alphas_cumprod.cpu().double()[timesteps]
    alpha_bar_prev = torch.cat([alpha_bar[1:], torch.tensor([float(final_alpha_bar)], dtype=torch.float64)])
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * variance.clamp_min(0).sqrt()
    # Where alpha_bar is about 0 and eta is 1, sigma^2 is nearly 1 - alpha_bar_prev. Rounding may make the difference < 0.
    direction = (1 - alpha_bar_prev - sigma**2).clamp_min(0).sqrt()
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    output = target(prediction_type, signal, noise)
    # Equation 12: mu = sqrt(alpha_bar_prev) x_0 + direction eps
    return affine_table(timesteps, (signal, noise), output, (alpha_bar_prev.sqrt(), direction), sigma)


def make_noise_levels(alphas_cumprod: Tensor, *, prediction_type: str) -> NoiseLevels:
    """The noise levels of the training schedule alpha_bar [num_train_timesteps], one for each timestep.

    A level without any signal is left out if the network's output does not tell the image there: with a prediction of eps.
    An unknown `prediction_type` raises a ValueError.
    """
    alpha_bar = alphas_cumprod.cpu().double()
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    clean, noisy = target(prediction_type, signal, noise)
    told = (signal * noisy - noise * clean) != 0
    coefficients = (values[told].float() for values in (signal, noise, clean, noisy))
    return NoiseLevels(torch.arange(len(alpha_bar))[told], *coefficients)


def target(prediction_type: str, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(clean, noisy): a network of this type outputs clean x_0 + noisy eps at x_t = signal x_0 + noise eps."""
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    match prediction_type:
        case "epsilon":
            return zero, one
        case "v_prediction":  # v = signal eps - noise x_0
            return -noise, signal
        case "sample":
            return one, zero
    raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
