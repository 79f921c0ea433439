"""D3PO: direct preference optimisation on denoising transitions (Yang et al. 2023, arXiv 2311.13231, section 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class D3poOptions:
    """Options of `d3po`."""

    beta: float = option("dpo_beta", "[0, 1e6]")  # of mean log-ratios


def d3po(log_prob: Tensor, old_log_prob: Tensor, base_log_prob: Tensor, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta (log p(w)/p_base(w) - log p(l)/p_base(l))) for the better transition w and the worse one l.

    All arguments [2,N], w first; returns the loss of each pair [N]. Log-probs are means over D, so `beta` is D times the
    beta of joint log-ratios. Metrics: `log_ratio` to the policy that sampled [2,N], `clipped` (1 where the sigmoid has cut
    the gradient to less than a tenth of what it is at a margin of 0) and `margin`, the sigmoid's argument [N].
    """
    better, worse = log_prob - base_log_prob
    margin = beta * (better - worse)
    with torch.no_grad():
        saturated = (torch.sigmoid(-margin) < 0.05).float()
        metrics = {"log_ratio": log_prob - old_log_prob, "clipped": saturated, "margin": margin.detach()}
    return -logsigmoid(margin), metrics
