"""DiffusionNFT: learning on the forward process by contrast (Zheng et al. 2025, arXiv 2509.16117)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from b2diffurl.objectives.leash import LeashOptions, leash, mean_square
from b2diffurl.objectives.options import option

TINY = 1e-6  # an error this small is none; the division must not be by 0


@dataclass(frozen=True)
class NftOptions(LeashOptions):
    """Options of `nft`."""

    beta: float = option("nft_beta", "(0, 1e3]")  # how far the policy is mixed with the old one: 1 is the policy itself
    scale: float = option("nft_scale", "(0, 1e6]")  # c: an image whose advantage is c or more counts as wholly good


def nft(
    output: Tensor,
    old_output: Tensor,
    base_output: Tensor | None,
    target: Tensor,
    trained: Tensor,
    gain: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    scale: float,
    old_weight: float,
    base_weight: float,
    outside_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """r |x+ - x_0|^2 / sg(mean |x+ - x_0|) + (1 - r) |x- - x_0|^2 / sg(mean |x- - x_0|), plus the `leash`.

    x+ and x- are the clean images that follow from out+- = (1 -+ beta) old_output +- beta output: the policy, and its
    mirror image on the other side of the old policy. r = 1/2 + clip(advantage / scale, -1, 1) / 2 is how good an image is.
    The first term draws the policy towards a good image. The second draws its mirror image to a bad one, which pushes the
    policy away. sg stops the gradient: the divisions even out levels of noise. All this counts where `trained` is 1.

    Outputs and `target` are [N,C,h,w]; `trained`, `gain` and `advantage` [N]. Returns the loss [N] and the metrics of the
    leash and, each [N], `log_ratio`, by how much the policy fits the image better than the old one, 0 outside, as a mean
    over the D dimensions of the output, and `clipped`, always 0.
    """
    r = 0.5 + 0.5 * (advantage / scale).clamp(-1, 1)
    moved = beta * (output - old_output)
    errors = old_output + moved - target, old_output - moved - target
    # A clean image is off by gain times the output's error, so |x - x_0|^2 / mean |x - x_0| has one factor of gain.
    drawn, pushed = (gain * mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp_min(TINY) for error in errors)
    weights = {"old_weight": old_weight, "base_weight": base_weight, "outside_weight": outside_weight}
    held, metrics = leash(output, old_output, base_output, trained, **weights)
    with torch.no_grad():
        log_ratio = trained * (mean_square(old_output - target) - mean_square(output - target))
    loss = trained * (r * drawn + (1 - r) * pushed) + held
    return loss, metrics | {"log_ratio": log_ratio, "clipped": torch.zeros_like(r)}
