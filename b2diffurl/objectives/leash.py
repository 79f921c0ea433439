"""What holds back a policy that is trained on noised images: its distance to the old and to the base policy."""

from dataclasses import dataclass

from torch import Tensor

from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class LeashOptions:
    """Options of every objective on noised images. A policy whose distance has no weight is not evaluated for it."""

    old_weight: float = option("old_weight", "[0, 1e6]")  # of the distance to the policy that sampled
    base_weight: float = option("base_weight", "[0, 1e6]", term="base_output")  # of the distance to the base policy


def mean_square(difference: Tensor) -> Tensor:
    """Mean square over the latent dimensions, [N,C,h,w] -> [N]."""
    return difference.square().flatten(1).mean(1)


def leash(
    output: Tensor, old_output: Tensor, base_output: Tensor | None, *, old_weight: float, base_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """old_weight |output - old_output|^2 + base_weight |output - base_output|^2, and both distances as metrics, each [N].

    Outputs are [N,C,h,w], distances are means over the latent dimensions. `base_output` is None if its weight is 0. The KL
    divergence of two policies' steps is proportional to the distance of their outputs (transition.transition_kl).
    """
    distance = mean_square(output - old_output)
    loss, metrics = old_weight * distance, {"old_distance": distance.detach()}
    if base_output is not None:
        distance = mean_square(output - base_output)
        loss, metrics = loss + base_weight * distance, metrics | {"base_distance": distance.detach()}
    return loss, metrics
