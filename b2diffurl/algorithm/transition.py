"""One step of any sampler as a Gaussian policy, whose mean is affine in the state and in the network's output.

    p(x_prev | x_t) = N(mu, sigma^2),   mu = a x_t + b output

A table holds a row (timestep, a, b, sigma) for each step; ddim.py and flow.py fill one. Sampling is `transition` plus noise.
Training is `transition` plus `log_prob`. There is no second formula, and nothing here depends on which sampler filled the
table.

    T sampler steps, i in 0..T-1 counts them in sampling order (from noise to image), S of them trained: the window
    N rows, C x H x W latents
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from b2diffurl.algorithm.window import Window

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

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.timesteps, self.a, self.b, self.sigma

    def to(self, device: torch.device | str) -> "Transitions":
        return Transitions(*(column.to(device) for column in self.columns))

    def rows(self, start: int, stop: int) -> "Transitions":
        return Transitions(*(column[start:stop] for column in self.columns))


def affine_table(
    timesteps: Tensor, state: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor], mu: tuple[Tensor, Tensor], sigma: Tensor
) -> Transitions:
    """The table of steps whose mean is given by the x_0 and eps that the network predicts; every tensor is [T], in float64.

    `state`, `output` and `mu` are factors of x_0 and of eps: of which x_t and the network's output are made, so that x_0 and
    eps follow from these two, and of which the mean is made. The coefficients are rounded to float32 at the end.
    """
    (signal, noise), (clean, noisy), (of_x_0, of_eps) = state, output, mu
    determinant = signal * noisy - noise * clean
    a, b = (of_x_0 * noisy - of_eps * clean) / determinant, (of_eps * signal - of_x_0 * noise) / determinant
    return Transitions(timesteps, a.float(), b.float(), sigma.float())


def put_together(prefix: Transitions, trained: Transitions, tail: Transitions, window: Window) -> Transitions:
    """The steps of `prefix` before `window`, those of `trained` in it, and all of `tail`, which may be fewer than were left.

    The three may differ in eta.
    """
    parts = prefix.rows(0, window.start), trained.rows(window.start, window.stop), tail
    return Transitions(*(torch.cat(columns) for columns in zip(*(part.columns for part in parts), strict=True)))


def require_stochastic(table: Transitions, window: Window) -> None:
    """Raise a ValueError if a transition in `window` is deterministic: it has no log-probability."""
    if window.stop > table.num_steps:
        raise ValueError(f"the trained window {window} must lie in 0..{table.num_steps} (sample.num_steps)")
    trained = table.rows(window.start, window.stop)
    deterministic = trained.timesteps[trained.sigma <= 0].tolist()
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


def step_weights(table: Transitions, window: Window, kind: str) -> Tensor:
    """The weight of each step of `window` in the loss, [S], with mean 1.

    `none`: all alike, as in the paper's code. `leverage`: inverse to the step's leverage. `sigma`: proportional to the noise
    that the step adds, because a step can decide no more than its noise changes. `sigma` also evens out the steps' gradient
    norms.
    """
    trained = table.rows(window.start, window.stop)
    if kind == "none":
        return torch.ones(window.num_steps, device=table.sigma.device)
    if kind == "leverage":
        weights = 1 / leverage(trained)
        return weights / weights.mean()
    if kind == "sigma":
        return trained.sigma / trained.sigma.mean()
    raise ValueError(f"unknown train.step_weight {kind!r}; known: {', '.join(STEP_WEIGHTS)}")
