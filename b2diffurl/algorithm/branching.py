"""Branch-based sampling (arXiv 2503.11240, section 4.2): denoise one prefix, then continue it in K branches.

G groups (one prefix each), K branches, N = G*K rows in group-major order (row g*K + k)
T sampler steps, the last S of them trained
"""

import torch
from torch import Tensor

from b2diffurl.algorithm.transition import Transitions, log_prob, transition
from b2diffurl.algorithm.types import Noise, Predict


def denoise(predict: Predict, table: Transitions, x: Tensor, noise: Noise, steps: range) -> Tensor:
    """Run `steps` of the sampler from x [N,C,H,W] and return the state after them, [N,C,H,W]."""
    for i in steps:
        mu, sigma = transition(table, i, x, predict(x, i))
        x = mu + sigma * noise(x.shape)
    return x


def branch_sample(
    predict: Predict, table: Transitions, x_T: Tensor, noise: Noise, *, num_branches: int, num_trained_steps: int
) -> tuple[Tensor, Tensor]:
    """Denoise G prefixes from x_T [G,C,H,W], copy each K times before the last S steps, and denoise the copies apart.

    Returns the S+1 states of the trained window, latents [G,K,S+1,C,H,W], and log_probs [G,K,S] of its transitions, both
    float32. `predict` sees G rows in the prefix and G*K rows after it.
    """
    num_groups, split = len(x_T), table.num_steps - num_trained_steps
    x = denoise(predict, table, x_T, noise, range(split)).repeat_interleave(num_branches, dim=0)
    latents, log_probs = [x], []
    for i in range(split, table.num_steps):
        mu, sigma = transition(table, i, x, predict(x, i))
        x = mu + sigma * noise(x.shape)
        latents.append(x)
        # Of the state as it is stored, so that training on it finds an importance ratio of 1.
        log_probs.append(log_prob(x, mu, sigma))
    grouped = (num_groups, num_branches)
    return torch.stack(latents, 1).unflatten(0, grouped), torch.stack(log_probs, 1).unflatten(0, grouped)
