"""DDIM (Song et al. 2021, arXiv 2010.02502), for every prediction type: transitions (equations 12, 16), and noise levels."""

import torch
from torch import Tensor

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions

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
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    signal_prev, direction = alpha_bar_prev.sqrt(), (1 - alpha_bar_prev - sigma**2).clamp_min(0).sqrt()
    # Equation 12 is mu = signal_prev x_0 + direction eps. Each type gives x_0 and eps by x_t and the network's output.
    match prediction_type:
        case "epsilon":  # x_0 = (x_t - noise eps) / signal
            a, b = signal_prev / signal, direction - signal_prev * noise / signal
        case "v_prediction":  # x_0 = signal x_t - noise v, eps = noise x_t + signal v
            a, b = signal_prev * signal + direction * noise, direction * signal - signal_prev * noise
        case "sample":  # eps = (x_t - signal x_0) / noise
            a, b = direction / noise, signal_prev - direction * signal / noise
        case _:
            raise unknown_type(prediction_type)
    return Transitions(timesteps, a.float(), b.float(), sigma.float())


def make_noise_levels(alphas_cumprod: Tensor, *, prediction_type: str) -> NoiseLevels:
    """The noise levels of the training schedule alpha_bar [num_train_timesteps], one for each timestep.

    A level without any signal is left out if the network's output does not tell the image there: with a prediction of eps.
    An unknown `prediction_type` raises a ValueError.
    """
    alpha_bar = alphas_cumprod.cpu().double()
    signal, noise, zero, one = (
        alpha_bar.sqrt(),
        (1 - alpha_bar).sqrt(),
        torch.zeros_like(alpha_bar),
        torch.ones_like(alpha_bar),
    )
    match prediction_type:
        case "epsilon":
            clean, noisy = zero, one
        case "v_prediction":  # v = signal eps - noise x_0
            clean, noisy = -noise, signal
        case "sample":
            clean, noisy = one, zero
        case _:
            raise unknown_type(prediction_type)
    told = (signal * noisy - noise * clean) != 0
    coefficients = (values[told].float() for values in (signal, noise, clean, noisy))
    return NoiseLevels(torch.arange(len(alpha_bar))[told], *coefficients)


def unknown_type(prediction_type: str) -> ValueError:
    return ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
