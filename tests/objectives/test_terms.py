"""What an objective may ask for: only that is computed, and it is what two normals say."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from b2diffurl.algorithm.ddim import make_transitions
from b2diffurl.algorithm.transition import transition
from b2diffurl.objectives import Objective
from b2diffurl.objectives.terms import TRANSITION_TERMS, transition_terms


class Asked:
    """Four transitions at three steps, and how often each network was asked."""

    def __init__(self):
        self.table = make_transitions(
            torch.tensor([2, 1, 0]), torch.linspace(0.9, 0.2, 4), 0.95, eta=1.0, prediction_type="epsilon"
        )
        self.i = torch.tensor([0, 2, 1, 1])
        generator = torch.Generator().manual_seed(0)
        self.x_t, self.x_prev, self.output, self.base = torch.randn(4, 4, 2, 3, 3, generator=generator)
        self.old_log_prob, self.advantage = torch.randn(2, 4, generator=generator)
        self.output.requires_grad_(), self.base.requires_grad_()
        self.counted = {"policy": 0, "base": 0}

    def terms(self, *names: str) -> tuple[Tensor, ...]:
        def answer(which: str, output: Tensor) -> Tensor:
            self.counted[which] += 1
            return 2 * output

        return transition_terms(
            names,
            self.table,
            self.i,
            self.x_t,
            self.x_prev,
            old_log_prob=self.old_log_prob,
            advantage=self.advantage,
            predict=lambda: answer("policy", self.output),
            predict_base=lambda: answer("base", self.base),
        )


@pytest.mark.parametrize(
    ("names", "policy", "base"),
    [
        (("advantage", "old_log_prob"), 0, 0),
        (("log_prob", "old_log_prob", "advantage"), 1, 0),
        (("base_log_prob",), 0, 1),
        (("kl",), 1, 1),
        (("kl", "base_log_prob", "log_prob"), 1, 1),
    ],
)
def test_only_what_is_asked_is_computed(names, policy, base):
    """Terms come in the order of their names, and each network is evaluated once where one of them needs it, else not."""
    asked = Asked()
    found = dict(zip(names, asked.terms(*names), strict=True))
    assert asked.counted == {"policy": policy, "base": base}
    everything = dict(zip(TRANSITION_TERMS, Asked().terms(*TRANSITION_TERMS), strict=True))
    assert all(torch.equal(value, everything[name]) for name, value in found.items())


def test_terms_are_those_of_two_normals():
    """Log-probs and KL against torch.distributions, each row at its own step; the base policy has no gradient, and the
    policy's is autograd's through both."""
    asked = Asked()
    names = ("log_prob", "base_log_prob", "kl", "old_log_prob", "advantage")
    log_prob, base_log_prob, kl, old_log_prob, advantage = asked.terms(*names)
    normals = [Normal(*transition(asked.table, asked.i, asked.x_t, 2 * out)) for out in (asked.output, asked.base)]
    for value, normal in zip((log_prob, base_log_prob), normals, strict=True):
        torch.testing.assert_close(value, normal.log_prob(asked.x_prev).flatten(1).mean(1))
    expected = kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(kl, expected)
    assert torch.equal(old_log_prob, asked.old_log_prob)
    assert torch.equal(advantage, asked.advantage)
    assert not base_log_prob.requires_grad
    gradient, base_gradient = torch.autograd.grad(kl.sum(), (asked.output, asked.base), allow_unused=True)
    assert base_gradient is None
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), asked.output)[0])


def test_an_objective_asks_only_for_terms_that_exist():
    """A loss with another positional parameter is refused as soon as it becomes an objective, with the names there are."""

    def loss(log_prob, reward):
        return log_prob * reward, {}

    with pytest.raises(ValueError, match=r"'reward'.*log_prob, old_log_prob, base_log_prob, kl, advantage"):
        Objective(loss)
