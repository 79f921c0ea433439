"""The terms that an objective may ask for. A loss asks by naming its positional parameters after them.

Of a transition, each [M] for M of them, log-probabilities and the KL as means over the latent dimensions:

    log_prob        log-probability under the policy that is trained, with gradient
    old_log_prob    the same under the policy that sampled
    base_log_prob   the same under the frozen base policy
    kl              KL(policy || base policy), with gradient
    advantage       how much better the transition was than the baseline

Of an image that was noised again, each [M,C,h,w] or [M] for M of them:

    output          the network's output at x_t under the policy that is trained, with gradient
    old_output      the same under the policy that sampled
    base_output     the same under the frozen base policy
    target          what the network should output at x_t, given the image and the noise
    trained         [M], 1 where the policy is trained on the image, 0 where it is only held to the base policy
    gain            [M], by how much an error of the output moves the clean image that follows from it
    advantage       [M], how much better the image was than the baseline

An objective asks for terms of one kind. The network is evaluated for a policy at most once, and only if a term needs it.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions, log_prob, transition, transition_kl

TRANSITION_TERMS = ("log_prob", "old_log_prob", "base_log_prob", "kl", "advantage")
NOISED_TERMS = ("output", "old_output", "base_output", "target", "trained", "gain", "advantage")
BASE_TERMS = ("base_log_prob", "kl", "base_output")  # these need the frozen base policy
OLD_TERMS = ("old_output",)  # these need the policy that sampled, which has to be evaluated again

PredictOutput = Callable[[], Tensor]  # () -> the guided model output [M,C,h,w] at x_t
PredictSome = Callable[[Tensor], Tensor]  # (rows [m]) -> the same for some of the M rows, [m,C,h,w]


def require_known(names: Collection[str]) -> None:
    """Raise a ValueError for a name that is not a term, and for terms of both kinds."""
    known = (*TRANSITION_TERMS, *NOISED_TERMS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown term {unknown[0]!r} of an objective; known: {', '.join(dict.fromkeys(known))}")
    if not (set(names) <= {*TRANSITION_TERMS} or set(names) <= {*NOISED_TERMS}):
        raise ValueError(f"an objective asks for terms of transitions and of noised images: {', '.join(names)}")


def transition_terms(
    names: Sequence[str],
    table: Transitions,
    i: Tensor,  # [M] step of each transition
    x_t: Tensor,  # [M,C,h,w]
    x_prev: Tensor,  # [M,C,h,w] where the transition led
    *,
    old_log_prob: Tensor,  # [M]
    advantage: Tensor,  # [M]
    predict: PredictOutput,
    predict_base: PredictOutput,
) -> tuple[Tensor, ...]:
    """The terms of transitions that `names` asks for, in that order, each [M]."""
    require_known(names)
    # The base policy first: it keeps no activations, so the two networks' memory does not add up.
    if any(name in BASE_TERMS for name in names):
        with torch.no_grad():
            mu_base, sigma = transition(table, i, x_t, predict_base())
    if "log_prob" in names or "kl" in names:
        mu, sigma = transition(table, i, x_t, predict())
    # Functions, because not every tensor below exists: mu only if a term needs it.
    compute = {
        "log_prob": lambda: log_prob(x_prev, mu, sigma),
        "old_log_prob": lambda: old_log_prob,
        "base_log_prob": lambda: log_prob(x_prev, mu_base, sigma),
        "kl": lambda: transition_kl(mu, mu_base, sigma),
        "advantage": lambda: advantage,
    }
    return tuple(compute[name]() for name in names)


def noised_terms(
    names: Sequence[str],
    levels: NoiseLevels,
    level: Tensor,  # [M] row of `levels` to which each image was noised
    x_0: Tensor,  # [M,C,h,w] the images
    eps: Tensor,  # [M,C,h,w] the noise
    *,
    trained: Tensor,  # [M] bool
    advantage: Tensor,  # [M]
    predict: PredictSome,
    predict_old: PredictSome,
    predict_base: PredictSome,
    base_everywhere: bool,  # whether base_output is needed for all rows; if not it is 0 where the policy is trained
    unused: Collection[str] = (),
) -> tuple[Tensor | None, ...]:
    """The terms of noised images that `names` asks for, in that order; None for those in `unused`."""
    require_known(names)
    every = torch.arange(len(x_0), device=x_0.device)

    def base_output() -> Tensor:
        rows = every if base_everywhere else every[~trained]
        output = torch.zeros_like(x_0)
        return output.index_copy_(0, rows, predict_base(rows)) if len(rows) else output

    compute = {
        # The two policies without gradient first: they keep no activations, so the networks' memory does not add up.
        "old_output": torch.no_grad()(lambda: predict_old(every)),
        "base_output": torch.no_grad()(base_output),
        "output": lambda: predict(every),
        "target": lambda: levels.target(level, x_0, eps),
        "trained": trained.float,
        "gain": lambda: levels.gain[level],
        "advantage": lambda: advantage,
    }
    computed = {name: compute[name]() for name in compute if name in names and name not in unused}
    return tuple(computed.get(name) for name in names)
