"""DDPO-IS: clipped importance-sampled policy gradient (Black et al. 2023, arXiv 2305.13301, section 4.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class DdpoOptions:
    """Options of `ddpo`."""

    clip_range: float = option("eps", "[0, 1e6]")  # c: the importance ratio is clipped to 1 - c .. 1 + c


def ddpo(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), negated because it is minimised.

    All arguments are [N]. Returns the loss of each transition [N] and the metrics `log_ratio` [N] and `clipped` [N], 1 where
    clipping makes the gradient 0. Log-probs are means over the D latent dimensions, so the clip range c bounds the joint
    log-ratio at D ln(1+c).
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        metrics = {"log_ratio": log_ratio.detach(), "clipped": (clipped > unclipped).float()}
    return torch.maximum(unclipped, clipped), metrics
