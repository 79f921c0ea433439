"""Branch-based sampling (arXiv 2503.11240, section 4.2): denoise one prefix, then continue it in K branches.

G groups (one prefix each), K branches, N = G*K rows in group-major order (row g*K + k)
T sampler steps, S of them trained: the window
"""

import torch
from torch import Tensor

from b2diffurl.algorithm.transition import Transitions, log_prob, transition
from b2diffurl.algorithm.types import Noise, Predict
from b2diffurl.algorithm.window import Window


def denoise(predict: Predict, table: Transitions, x: Tensor, noise: Noise, steps: range) -> Tensor:
    """Run `steps` of the sampler from x [N,C,H,W] and return the state after them, [N,C,H,W]."""
    for i in steps:
        mu, sigma = transition(table, i, x, predict(x, i))
        x = mu + sigma * noise(x.shape)
    return x


def branch_sample(
    predict: Predict, table: Transitions, x_T: Tensor, noise: Noise, *, num_branches: int, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Denoise G prefixes from x_T [G,C,H,W], copy each K times where the window starts, and denoise the copies apart.

    Returns the S+1 states of the window, latents [G,K,S+1,C,H,W], log_probs [G,K,S] of its transitions, and the finished
    latents [G,K,C,H,W], all float32. `predict` sees G rows in the prefix and G*K rows after it.
    """
    x = denoise(predict, table, x_T, noise, range(window.start)).repeat_interleave(num_branches, dim=0)
    latents, log_probs = [x], []
    for i in range(window.start, window.stop):
        mu, sigma = transition(table, i, x, predict(x, i))
        x = mu + sigma * noise(x.shape)
        latents.append(x)
        # Of the state as it is stored, so that training on it finds an importance ratio of 1.
        log_probs.append(log_prob(x, mu, sigma))
    finished = denoise(predict, table, x, noise, range(window.stop, table.num_steps))
    grouped = (len(x_T), num_branches)
    return *(torch.stack(each, 1).unflatten(0, grouped) for each in (latents, log_probs)), finished.unflatten(0, grouped)
