"""What holds back a policy that is trained on noised images: its distance to the old and to the base policy."""

from dataclasses import dataclass

from torch import Tensor

from b2diffurl.objectives.options import option


@dataclass(frozen=True)
class LeashOptions:
    """Options of every objective on noised images. A policy whose distance has no weight is not evaluated for it."""

    old_weight: float = option("old_weight", "[0, 1e6]")  # of the distance to the policy that sampled
    base_weight: float = option("base_weight", "[0, 1e6]", term="base_output")  # of the distance to the base policy
    outside_weight: float = option("outside_weight", "[0, 1e6]", term="base_output")  # the same, outside what is trained


def mean_square(difference: Tensor) -> Tensor:
    """Mean square over the latent dimensions, [N,C,h,w] -> [N]."""
    return difference.square().flatten(1).mean(1)


def leash(
    output: Tensor,
    old_output: Tensor,
    base_output: Tensor | None,
    trained: Tensor,
    *,
    old_weight: float,
    base_weight: float,
    outside_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """old_weight |output - old_output|^2 + base_weight |output - base_output|^2, where `trained` [N] is 1.

    Where it is 0 this is outside_weight |output - base_output|^2. At levels of noise outside the trained window, and without
    a prompt, nothing is to be learnt, but the LoRA acts there, too.

    Outputs are [N,C,h,w], distances means over the latent dimensions. `base_output` is None if it has no weight. Returns the
    penalty [N] and metrics, each [N]: `old_distance` and, if it has a weight, `base_penalty`, the part of the base policy.

    The KL divergence of two policies' steps is proportional to the distance of their outputs (transition.transition_kl).
    """
    distance = mean_square(output - old_output)
    loss, metrics = old_weight * distance * trained, {"old_distance": distance.detach()}
    if base_output is not None:
        weight = base_weight * trained + outside_weight * (1 - trained)
        penalty = weight * mean_square(output - base_output)
        loss, metrics = loss + penalty, metrics | {"base_penalty": penalty.detach()}
    return loss, metrics
