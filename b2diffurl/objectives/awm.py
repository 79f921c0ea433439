"""AWM: advantage-weighted matching, policy gradient on the forward process (Xue et al. 2025, arXiv 2509.25050)."""

from dataclasses import dataclass

from torch import Tensor

from b2diffurl.objectives.ddpo import ddpo
from b2diffurl.objectives.leash import LeashOptions, leash, mean_square
from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class AwmOptions(LeashOptions):
    """Options of `awm`."""

    clip_range: float = option("awm_clip", "[0, 1e6]")  # c: the ratio is clipped to 1 - c .. 1 + c


def awm(
    output: Tensor,
    old_output: Tensor,
    base_output: Tensor | None,
    target: Tensor,
    trained: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    old_weight: float,
    base_weight: float,
    outside_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (`ddpo`) with -|output - target|^2 in place of the log-likelihood, plus the `leash`.

    The matching loss |output - target|^2, a mean over the D dimensions, bounds an image's negative log-likelihood up to a
    weight for each level of noise. Its difference to that of the old policy is the logarithm of the ratio. The surrogate
    counts where `trained` is 1.

    Outputs and `target` are [N,C,h,w], `trained` and `advantage` [N]. Returns the loss [N] and the metrics of `ddpo` and
    of the leash.
    """
    log_prob, old_log_prob = -mean_square(output - target), -mean_square(old_output - target)
    loss, metrics = ddpo(log_prob, old_log_prob, advantage, clip_range=clip_range)
    weights = {"old_weight": old_weight, "base_weight": base_weight, "outside_weight": outside_weight}
    held, distances = leash(output, old_output, base_output, trained, **weights)
    return trained * loss + held, {name: trained * value for name, value in metrics.items()} | distances
