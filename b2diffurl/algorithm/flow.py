"""Flow matching (rectified flow, arXiv 2209.03003): transitions of stochastic samplers, and noise levels.

    x_sigma = (1 - sigma) x_0 + sigma eps,   network output v = eps - x_0

T sampler steps, L noise levels
"""

import math

import torch
from torch import Tensor

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions, affine_table

SDES = ("cps", "flow", "dance")


def make_transitions(timesteps: Tensor, sigmas: Tensor, *, eta: float, sde: str) -> Transitions:
    """The table of the transitions between decreasing `sigmas` [T+1], with the noise level `eta` of the kind `sde`.

    `timesteps` [T] is what the network takes at all but the last of them. An unknown `sde` raises a ValueError. With eta 0
    each kind is Euler's step of the deterministic ODE.

    cps    keeps the noise in x at what the network expects there (coefficient-preserving sampling, arXiv 2509.05952). Its
           last step adds none
    flow   the SDE of Flow-GRPO (arXiv 2505.05470), whose noise grows towards the start
    dance  that of DanceGRPO (arXiv 2505.07818), whose noise a unit of time is the same in all steps
    """
    sigmas = sigmas.cpu().double()
    here, there = sigmas[:-1], sigmas[1:]
    one = torch.ones_like(here)
    match sde:
        case "cps":
            of_eps, deviation = there * math.cos(eta * math.pi / 2), there * math.sin(eta * math.pi / 2)
        case "flow":  # at sigma = 1 the square of s would be infinite, and the next sigma stands in the denominator
            of_eps, deviation = euler_maruyama(here, there, eta**2 * here / (1 - torch.where(here == 1, there, here)))
        case "dance":
            of_eps, deviation = euler_maruyama(here, there, eta**2 * one)
        case _:
            raise ValueError(f"unknown SDE {sde!r}; known: {', '.join(SDES)}")
    return affine_table(timesteps.float(), (1 - here, here), (-one, one), (1 - there, of_eps), deviation)


def euler_maruyama(here: Tensor, there: Tensor, s_squared: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the SDE dx = [v + s^2 / (2 sigma) eps] dt + s dw from sigma `here` to `there`, both [T].

    Returns the factor of eps in its mean, where that of x_0 is 1 - `there`, and its standard deviation.
    """
    dt = there - here  # below 0
    return there + s_squared / (2 * here) * dt, (s_squared * -dt).sqrt()


def make_noise_levels(timesteps: Tensor, sigmas: Tensor) -> NoiseLevels:
    """The noise levels at increasing `sigmas` [L] above 0, where the network takes `timesteps` [L]."""
    sigmas = sigmas.cpu().double()
    one = torch.ones_like(sigmas)
    return NoiseLevels(timesteps.float(), *(values.float() for values in (1 - sigmas, sigmas, -one, one)))
