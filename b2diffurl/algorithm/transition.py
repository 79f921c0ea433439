"""One step of any sampler as a Gaussian policy, whose mean is affine in the state and in the network's output.

    p(x_prev | x_t) = N(mu, sigma^2),   mu = a x_t + b output

A table holds a row (timestep, a, b, sigma) for each step; ddim.py fills one. Sampling is `transition` plus noise. Training
is `transition` plus `log_prob`. There is no second formula, and nothing here depends on which sampler filled the table.

    T sampler steps, i in 0..T-1 counts them in sampling order (from noise to image), the last S of them trained
    N rows, C x H x W latents
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEP_WEIGHTS = ("none", "leverage", "sigma")


@dataclass(frozen=True)
class Transitions:
    """The T transitions of a sampler, in sampling order.

    Compute the coefficients in float64 before you round them: they contain differences of nearly equal numbers.
    """

    timesteps: Tensor  # [T] int64, or float32 where the network takes fractions
    a: Tensor  # [T] float32, d mu / d x_t
    b: Tensor  # [T] float32, d mu / d output
    sigma: Tensor  # [T] float32

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Transitions":
        return Transitions(*(field.to(device) for field in (self.timesteps, self.a, self.b, self.sigma)))


def with_prefix(table: Transitions, prefix: Transitions, num_trained_steps: int) -> Transitions:
    """`table` with all but its last S rows taken from `prefix`, for a prefix of another eta."""
    split = table.num_steps - num_trained_steps
    pairs = ((prefix.timesteps, table.timesteps), (prefix.a, table.a), (prefix.b, table.b), (prefix.sigma, table.sigma))
    return Transitions(*(torch.cat([before[:split], trained[split:]]) for before, trained in pairs))


def require_stochastic(table: Transitions, num_trained_steps: int) -> None:
    """Raise a ValueError if one of the last S transitions is deterministic: it has no log-probability."""
    if not 1 <= num_trained_steps <= table.num_steps:
        raise ValueError(f"split_step is {num_trained_steps}, allowed is 1..{table.num_steps} (sample.num_steps)")
    window = slice(table.num_steps - num_trained_steps, None)
    deterministic = table.timesteps[window][table.sigma[window] <= 0].tolist()
    if deterministic:
        raise ValueError(f"the transitions from t = {deterministic} have sigma = 0, so their log-probability is undefined")


def transition(table: Transitions, i: int | Tensor, x_t: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_prev | x_t) at step i, which is one for all rows, or a tensor [N].

    Returns mu [N,C,H,W] and sigma [N or 1,1,1,1], both float32 also where the network computes in half precision.
    """
    shape = (-1,) + (1,) * (x_t.dim() - 1)
    a, b, sigma = (column[i].view(shape) for column in (table.a, table.b, table.sigma))
    return a * x_t.float() + b * model_output.float(), sigma


def log_prob(x_prev: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """Log-density of N(mu, sigma^2) at x_prev, as the mean (not the sum) over the latent dimensions: [N,C,H,W] -> [N].

    The mean is DDPO's convention. An importance ratio is therefore the D-th root of the joint likelihood ratio.
    """
    density = -0.5 * ((x_prev - mu) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def transition_kl(mu: Tensor, mu_base: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(mu_base, sigma^2)) = |mu - mu_base|^2 / (2 sigma^2), [N,C,H,W] -> [N].

    Exact, because the variances are equal. Like `log_prob` it is the mean (not the sum) over the latent dimensions.
    """
    return (0.5 * ((mu - mu_base) / sigma) ** 2).flatten(1).mean(1)


def leverage(table: Transitions) -> Tensor:
    """|d mu / d output| / sigma of every step, [T]: by how many sigmas a unit of network output moves the mean."""
    return table.b.abs() / table.sigma


def step_weights(table: Transitions, num_trained_steps: int, kind: str) -> Tensor:
    """The weight of each of the last S steps in the loss, [S], with mean 1.

    `none`: all alike, as in the paper's code. `leverage`: inverse to the step's leverage. `sigma`: proportional to the noise
    that the step adds, because a step can decide no more than its noise changes. `sigma` also evens out the steps' gradient
    norms.
    """
    window = slice(table.num_steps - num_trained_steps, None)
    if kind == "none":
        return torch.ones(num_trained_steps, device=table.sigma.device)
    if kind == "leverage":
        weights = 1 / leverage(table)[window]
        return weights / weights.mean()
    if kind == "sigma":
        return table.sigma[window] / table.sigma[window].mean()
    raise ValueError(f"unknown train.step_weight {kind!r}; known: {', '.join(STEP_WEIGHTS)}")
