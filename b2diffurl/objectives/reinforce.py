"""DDPO-SF: the score-function policy gradient (Black et al. 2023, arXiv 2305.13301, section 4.3; Williams 1992)."""

import torch
from torch import Tensor


def reinforce(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log p, whose gradient is that of the expected reward where the policy is still the one that sampled.

    All arguments [N]; returns the loss of each transition [N], and its `log_ratio` and `clipped` (always 0) [N]. Nothing
    corrects for a policy that has moved on, so `log_ratio` says how far the samples have gone stale.
    """
    with torch.no_grad():
        metrics = {"log_ratio": log_prob - old_log_prob, "clipped": torch.zeros_like(log_prob)}
    return -advantage * log_prob, metrics
