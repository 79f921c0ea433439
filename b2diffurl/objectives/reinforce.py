"""DDPO-SF: the score-function policy gradient (Black et al. 2023, arXiv 2305.13301, section 4.3; Williams 1992)."""

import torch
from torch import Tensor


def reinforce(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log p, whose gradient estimates that of the expected reward while the policy is the one that sampled.

    All arguments are [N]. Returns the loss of each transition [N] and the metrics `log_ratio` [N] and `clipped` [N], always
    0. Nothing corrects for samples of an older policy; `log_ratio` says how far off-policy they have become.
    """
    with torch.no_grad():
        metrics = {"log_ratio": log_prob - old_log_prob, "clipped": torch.zeros_like(log_prob)}
    return -advantage * log_prob, metrics
