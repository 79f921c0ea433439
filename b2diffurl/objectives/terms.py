"""The terms that an objective may ask for. A loss asks by naming its positional parameters after them.

    log_prob        log-probability under the policy that is trained, with gradient
    old_log_prob    the same under the policy that sampled
    base_log_prob   the same under the frozen base policy
    kl              KL(policy || base policy), with gradient
    advantage       how much better the transition was than the baseline

Each is [M] for M transitions. Log-probabilities and the KL are means over the latent dimensions.

An objective on another kind of sample, such as a noised image, needs a second tuple of names and a second function here. An
`Objective` would then say which kind it takes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from b2diffurl.algorithm.transition import Transitions, log_prob, transition, transition_kl

TRANSITION_TERMS = ("log_prob", "old_log_prob", "base_log_prob", "kl", "advantage")
BASE_TERMS = ("base_log_prob", "kl")  # these need the frozen base policy

PredictOutput = Callable[[], Tensor]  # () -> the guided model output [M,C,h,w] at x_t


def require_known(names: Sequence[str]) -> None:
    """Raise a ValueError for a name that is not a term."""
    unknown = [name for name in names if name not in TRANSITION_TERMS]
    if unknown:
        raise ValueError(f"unknown term {unknown[0]!r} of an objective; known: {', '.join(TRANSITION_TERMS)}")


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
    """The terms that `names` asks for, in that order, each [M].

    A network is evaluated at most once, and only if a term needs it. The base policy is evaluated without gradient.
    """
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
