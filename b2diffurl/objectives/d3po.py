"""D3PO: direct preference optimisation on denoising transitions (Yang et al. 2023, arXiv 2311.13231, section 4.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class D3poOptions:
    """Options of `d3po`."""

    beta: float = option("dpo_beta", "[0, 1e6]")  # of mean log-ratios: for b on joint ones give b D


def d3po(log_prob: Tensor, old_log_prob: Tensor, base_log_prob: Tensor, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta (log p(w)/p_base(w) - log p(l)/p_base(l))), w the better and l the worse transition of a pair.

    All arguments are [2,N], w first. Returns the loss of each pair [N] and three metrics: `log_ratio` [2,N] of the policy to
    the one that sampled, `margin` [N], the sigmoid's argument, and `clipped` [N], 1 where the sigmoid has saturated: where
    the gradient is less than a tenth of that at a margin of 0.
    """
    better, worse = log_prob - base_log_prob
    margin = beta * (better - worse)
    with torch.no_grad():
        # The loss's gradient is proportional to sigmoid(-margin), which is 0.5 at a margin of 0.
        saturated = (torch.sigmoid(-margin) < 0.05).float()
        metrics = {"log_ratio": log_prob - old_log_prob, "clipped": saturated, "margin": margin.detach()}
    return -logsigmoid(margin), metrics
