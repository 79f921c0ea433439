"""A world in which everything is known: Gaussian data, whose noise prediction is a closed form without a network.

N rows, P prompts, latents [N,C,h,w]
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from b2diffurl.algorithm.ddim import make_noise_levels
from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.types import Conditions
from b2diffurl.models.noise_schedule import make_table

SPREAD = 0.5  # s, standard deviation of the data


class NoiseOfGaussian(nn.Module):
    """E[eps | x_t] for data N(mean + theta, SPREAD^2) and x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""

    def __init__(self, latent_shape: tuple[int, int, int]):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(latent_shape))
        self.adapted = True

    def forward(self, x_t: Tensor, alpha_bar: Tensor, mean: Tensor) -> Tensor:
        mean = mean + self.theta if self.adapted else mean
        residual = x_t - alpha_bar.sqrt() * mean
        return (1 - alpha_bar).sqrt() * residual / (alpha_bar * SPREAD**2 + 1 - alpha_bar)


class GaussianWorld:
    """What sampling and training use of `b2diffurl.models.Model`: a prompt is the mean of its data, written as a number, and
    theta, which is 0 in the base policy, shifts them all."""

    latent_shape, is_compiled = (1, 2, 2), False

    def __init__(self):
        self.network = NoiseOfGaussian(self.latent_shape)
        self.scheduler = DDIMScheduler.from_config(tiny.V1_4_SCHEDULER)

    def sampler(self, num_steps: int, eta: float = 1.0, steps: Sequence[int] | None = None, *, sde: str = "") -> Transitions:
        return make_table(self.scheduler, num_steps, eta, steps)

    def noise_levels(self) -> NoiseLevels:
        return make_noise_levels(self.scheduler.alphas_cumprod, prediction_type="epsilon")

    def encode(self, prompts: list[str]) -> Conditions:
        return {"mean": torch.tensor([float(prompt) for prompt in prompts]).view(-1, 1, 1, 1)}

    def prepare(self, prompts: Collection[str]) -> None:
        pass

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        unconditional: Conditions,
        guidance_scale: float,
        *,
        unconditional_gradient: bool = True,
    ) -> Tensor:
        assert guidance_scale == 1
        return self.network(x_t, self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1), conditions["mean"])

    @contextmanager
    def base_policy(self) -> Iterator[None]:
        self.network.adapted = False
        yield
        self.network.adapted = True

    @contextmanager
    def with_lora(self, parameters: dict[str, Tensor]) -> Iterator[None]:
        own, self.network.theta.data = self.network.theta.data, parameters["theta"]
        yield
        self.network.theta.data = own

    def trainable(self) -> dict[str, nn.Parameter]:
        return {"theta": self.network.theta}
