"""DPOK: policy gradient with a KL penalty to the frozen base policy (Fan et al. 2023, arXiv 2305.16381, section 4.2)."""

from dataclasses import dataclass

from torch import Tensor

from b2diffurl.objectives.ddpo import DdpoOptions, ddpo
from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class DpokOptions(DdpoOptions):
    """Options of `dpok`."""

    kl_weight: float = option("kl_weight", "[0, 1e6]")  # how much advantage outweighs a nat of KL to the base policy


def dpok(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, kl: Tensor, *, clip_range: float, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of `ddpo` plus kl_weight KL(p_theta || p_base).

    All arguments are [N]. Returns the loss of each transition [N], the metrics of `ddpo`, and `kl` [N] without weights.

    `kl` is a mean over D, like the log-probs. Both terms of the loss shrink alike with D, so kl_weight trades a nat of the
    joint KL against the advantage whatever D is. As in the paper, the KL is taken at the states that were sampled: how an
    earlier step changes later states is left out. The trainer's step weights weigh both terms.
    """
    loss, metrics = ddpo(log_prob, old_log_prob, advantage, clip_range=clip_range)
    return loss + kl_weight * kl, metrics | {"kl": kl.detach()}
