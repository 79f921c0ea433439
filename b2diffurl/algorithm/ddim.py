"""One DDIM transition as a Gaussian policy (Song et al. 2021, arXiv 2010.02502, equations 12 and 16).

Sampling is `transition` plus noise, training is `transition` plus `log_prob`: there is no second formula.

    T sampler steps, i in 0..T-1 counts them in sampling order (from noise to image)
    N rows, C x H x W latents
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
STEP_WEIGHTS = ("none", "leverage", "sigma")


@dataclass(frozen=True)
class Sampler:
    """The T transitions of a DDIM sampler, in sampling order.

    The coefficients are computed in float64 and kept in float32: near t = 0 the difference 1 - alpha_bar_t/alpha_bar_prev
    loses four digits in float32.
    """

    timesteps: Tensor  # [T] int64
    alpha_bar: Tensor  # [T] float32, at the step's own timestep
    alpha_bar_prev: Tensor  # [T] float32, at the next timestep on the way to the image
    sigma: Tensor  # [T] float32
    prediction_type: str

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Sampler":
        fields = (self.timesteps, self.alpha_bar, self.alpha_bar_prev, self.sigma)
        return Sampler(*(field.to(device) for field in fields), self.prediction_type)


def make_sampler(
    timesteps: Tensor, alphas_cumprod: Tensor, final_alpha_bar: float, *, eta: float, prediction_type: str
) -> Sampler:
    """Tabulate sigma_t(eta) (equation 16) over a decreasing list of timesteps [T].

    `alphas_cumprod` [num_train_timesteps] is the training schedule; `final_alpha_bar` stands where the last step lands.
    Each step leads to the next timestep of the list, whatever its spacing.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    timesteps = timesteps.long().cpu()
    alpha_bar = alphas_cumprod.cpu().double()[timesteps]
    alpha_bar_prev = torch.cat([alpha_bar[1:], torch.tensor([float(final_alpha_bar)], dtype=torch.float64)])
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * variance.clamp_min(0).sqrt()
    return Sampler(timesteps, alpha_bar.float(), alpha_bar_prev.float(), sigma.float(), prediction_type)


def with_prefix(sampler: Sampler, prefix: Sampler, num_trained_steps: int) -> Sampler:
    """The sampler with the noise of another in the steps before the last S."""
    split = sampler.num_steps - num_trained_steps
    return replace(sampler, sigma=torch.cat([prefix.sigma[:split], sampler.sigma[split:]]))


def require_stochastic(sampler: Sampler, num_trained_steps: int) -> None:
    """Refuse a training window in which a transition is deterministic, for its log-probability is undefined."""
    if not 1 <= num_trained_steps <= sampler.num_steps:
        raise ValueError(f"split_step is {num_trained_steps}, allowed is 1..{sampler.num_steps} (sample.num_steps)")
    window = slice(sampler.num_steps - num_trained_steps, None)
    frozen = sampler.timesteps[window][sampler.sigma[window] <= 0].tolist()
    if frozen:
        raise ValueError(
            f"the transitions from t = {frozen} have sigma = 0, so their log-probability is undefined. "
            "Set sample.eta > 0, and use a scheduler with set_alpha_to_one = false and steps_offset = 1."
        )


def transition(sampler: Sampler, i: int | Tensor, x_t: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_prev | x_t), equation 12. `i` is one step or a step for each row, [N].

    Returns mu [N,C,H,W] and sigma [N or 1,1,1,1], both float32.
    """
    x_t, model_output = x_t.float(), model_output.float()
    shape = (-1,) + (1,) * (x_t.dim() - 1)
    alpha_bar, alpha_bar_prev, sigma = (
        table[i].view(shape) for table in (sampler.alpha_bar, sampler.alpha_bar_prev, sampler.sigma)
    )
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if sampler.prediction_type == "epsilon":
        eps = model_output
        x_0 = (x_t - noise * eps) / signal
    elif sampler.prediction_type == "v_prediction":
        eps = signal * model_output + noise * x_t
        x_0 = signal * x_t - noise * model_output
    else:
        x_0 = model_output
        eps = (x_t - signal * x_0) / noise
    mu = alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - sigma**2).clamp_min(0).sqrt() * eps
    return mu, sigma


def log_prob(x_prev: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """Log-density of N(mu, sigma^2) at x_prev [N,C,H,W], the mean (not the sum) over the latent dimensions: [N]."""
    density = -0.5 * ((x_prev - mu) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def transition_kl(mu: Tensor, mu_ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(mu_ref, sigma^2)) = |mu - mu_ref|^2 / (2 sigma^2), [N,C,H,W] -> [N].

    Exact for equal variances; the mean (not the sum) over the latent dimensions, as in `log_prob`.
    """
    return (0.5 * ((mu - mu_ref) / sigma) ** 2).flatten(1).mean(1)


def leverage(sampler: Sampler) -> Tensor:
    """|d mu / d model_output| / sigma of every step, [T]: how far a unit of network output moves the policy.

    mu is linear in the output, so the derivative is mu at x_t = 0 and an output of one.
    """
    steps = torch.arange(sampler.num_steps, device=sampler.sigma.device)
    one = torch.ones(sampler.num_steps, 1, device=sampler.sigma.device)
    mu, sigma = transition(sampler, steps, torch.zeros_like(one), one)
    return (mu.abs() / sigma).flatten()


def step_weights(sampler: Sampler, num_trained_steps: int, kind: str) -> Tensor:
    """Weight of each of the last S steps in the objective, [S], mean 1.

    `none` weighs all alike (the reference). `leverage` divides by the leverage. `sigma` weighs a step by the noise it
    adds, for a step decides as much as its noise can change; it also evens out the steps' gradient norms.
    """
    window = slice(sampler.num_steps - num_trained_steps, None)
    if kind == "none":
        return torch.ones(num_trained_steps, device=sampler.sigma.device)
    if kind == "leverage":
        weights = 1 / leverage(sampler)[window]
        return weights / weights.mean()
    if kind == "sigma":
        return sampler.sigma[window] / sampler.sigma[window].mean()
    raise ValueError(f"unknown train.step_weight {kind!r}; known: {', '.join(STEP_WEIGHTS)}")
