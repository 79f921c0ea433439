"""Stock diffusers' schedulers, and our tables of their steps."""

import tiny
from diffusers import DDIMScheduler

from b2diffurl.algorithm.ddim import make_transitions
from b2diffurl.algorithm.transition import Transitions


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
