"""Branches share their prefix to the bit, then go apart; what is recorded is what was drawn."""

import pytest
import torch
from torch import Tensor

from b2diffurl.algorithm.branching import branch_sample, denoise
from b2diffurl.algorithm.ddim import make_transitions
from b2diffurl.algorithm.transition import Transitions, log_prob, transition
from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.window import Window

T, G, K, SHAPE = 6, 3, 4, (2, 3, 3)
TIMESTEPS = torch.tensor([900, 700, 450, 300, 120, 20])
ALPHAS_CUMPROD = torch.linspace(1 - 1e-3, 2e-2, 1000)


def ddim(eta: float = 1.0) -> Transitions:
    return make_transitions(TIMESTEPS, ALPHAS_CUMPROD, float(ALPHAS_CUMPROD[0]), eta=eta, prediction_type="epsilon")


def elementwise(x: Tensor, i: int) -> Tensor:
    """A network whose every output depends on its own input alone, so that batching cannot change a bit."""
    return torch.sin(x * (i + 1))


class Noise:
    """Standard normal noise that remembers what it gave."""

    def __init__(self):
        self.generator, self.drawn = torch.Generator().manual_seed(0), []

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.drawn.append(torch.randn(shape, generator=self.generator))
        return self.drawn[-1]


def run(num_trained_steps: int, num_branches: int = K) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    noise = Noise()
    x_T = noise((G, *SHAPE))
    window = Window.last(num_trained_steps, T)
    latents, log_probs, finished = branch_sample(elementwise, ddim(), x_T, noise, tree=Tree((num_branches,)), window=window)
    assert torch.equal(finished, latents[:, :, -1])
    return latents, log_probs, x_T, noise.drawn[1:]


@pytest.mark.parametrize("num_trained_steps", [1, 4, T])
def test_siblings_share_their_prefix_bitwise_and_then_differ(num_trained_steps):
    """The first state of the window is one and the same for all branches of a group; every later one differs between
    any two branches, and between any two groups."""
    latents, log_probs, _, _ = run(num_trained_steps)
    assert latents.shape == (G, K, num_trained_steps + 1, *SHAPE)
    assert log_probs.shape == (G, K, num_trained_steps)
    assert latents.dtype == log_probs.dtype == torch.float32
    assert torch.equal(latents[:, :, 0], latents[:, :1, 0].expand_as(latents[:, :, 0]))
    for step in range(1, num_trained_steps + 1):
        assert len(latents[:, :, step].flatten(0, 1).flatten(1).unique(dim=0)) == G * K
    assert len(latents[:, 0, 0].flatten(1).unique(dim=0)) == G


@pytest.mark.parametrize("num_trained_steps", [1, 4, T])
def test_batched_branches_equal_a_loop_over_single_trajectories(num_trained_steps):
    """Each (group, branch) is the plain DDIM recursion with its own rows of the noise, to the bit."""
    latents, _, x_T, drawn = run(num_trained_steps)
    for g in range(G):
        for k in range(K):
            x, states = x_T[g : g + 1], []
            for i in range(T):
                if i >= T - num_trained_steps:
                    states.append(x)
                row = g if i < T - num_trained_steps else g * K + k
                mu, sigma = transition(ddim(), i, x, elementwise(x, i))
                x = mu + sigma * drawn[i][row : row + 1]
            assert torch.equal(latents[g, k], torch.cat([*states, x]))


# (start, stop): in the middle, at the beginning, at the end.
WINDOWS = [(2, 4), (0, 3), (1, 5), (3, 6)]


def run_in(window: Window) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(latents, log_probs, finished, noise as it was drawn, x_T first)."""
    noise = Noise()
    x_T = noise((G, *SHAPE))
    return *branch_sample(elementwise, ddim(), x_T, noise, tree=Tree((K,)), window=window), noise.drawn


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_any_window_is_the_plain_recursion_step_by_step(start, stop):
    """Branches part where the window starts; its states are kept, and the finished one is that after all T steps."""
    latents, log_probs, finished, drawn = run_in(Window(start, stop))
    assert latents.shape == (G, K, stop - start + 1, *SHAPE) and log_probs.shape == (G, K, stop - start)
    for g in range(G):
        for k in range(K):
            states = [drawn[0][g : g + 1]]
            for i in range(T):
                mu, sigma = transition(ddim(), i, states[i], elementwise(states[i], i))
                row = g if i < start else g * K + k
                states.append(mu + sigma * drawn[i + 1][row : row + 1])
            assert torch.equal(latents[g, k], torch.cat(states[start : stop + 1]))
            assert torch.equal(finished[g, k], states[T][0])


@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_log_probs_of_any_window_are_those_of_its_states(start, stop):
    latents, log_probs, _, _ = run_in(Window(start, stop))
    rows = latents.flatten(0, 1)
    for step, i in enumerate(range(start, stop)):
        mu, sigma = transition(ddim(), i, rows[:, step], elementwise(rows[:, step], i))
        assert torch.equal(log_prob(rows[:, step + 1], mu, sigma).unflatten(0, (G, K)), log_probs[:, :, step])


def test_the_network_sees_the_prefix_once_a_group():
    """G rows before the branching point, G*K after it, one call a step in order."""
    calls = []

    def counting(x: Tensor, i: int) -> Tensor:
        calls.append((i, len(x)))
        return elementwise(x, i)

    noise = Noise()
    branch_sample(counting, ddim(), noise((G, *SHAPE)), noise, tree=Tree((K,)), window=Window(4, 6))
    assert calls == [(0, G), (1, G), (2, G), (3, G), (4, G * K), (5, G * K)]


def test_recorded_log_probs_are_those_of_the_recorded_states():
    """Scoring the stored states again gives the stored log-probs exactly; torch.distributions agrees."""
    latents, log_probs, _, _ = run(4)
    rows = latents.flatten(0, 1)
    for step in range(4):
        i = T - 4 + step
        mu, sigma = transition(ddim(), i, rows[:, step], elementwise(rows[:, step], i))
        again = log_prob(rows[:, step + 1], mu, sigma).unflatten(0, (G, K))
        assert torch.equal(again, log_probs[:, :, step])
        normal = torch.distributions.Normal(mu.double(), sigma.double())
        expected = normal.log_prob(rows[:, step + 1].double()).flatten(1).mean(1).unflatten(0, (G, K))
        torch.testing.assert_close(log_probs[:, :, step].double(), expected, rtol=1e-5, atol=1e-5)


def test_one_branch_is_plain_sampling():
    """With K = 1 the last state is what `denoise` reaches from the same noise, whatever the window."""
    for num_trained_steps in (1, 3, T):
        latents, _, x_T, _ = run(num_trained_steps, num_branches=1)
        noise = Noise()
        noise((G, *SHAPE))
        assert torch.equal(latents[:, 0, -1], denoise(elementwise, ddim(), x_T, noise, range(T)))


def test_a_tree_equals_a_loop_over_its_edges():
    """Three groups of 2 x 3 leaves, parting after steps 1 and 3 of 6, with a tail after step 5: each leaf is the plain DDIM
    recursion with the noise of the edges that it is on, to the bit; shared steps have one log-probability."""
    tree, window, noise, calls = Tree((2, 3), (2,)), Window(1, 5), Noise(), []

    def counting(x: Tensor, i: int) -> Tensor:
        calls.append(len(x))
        return elementwise(x, i)

    x_T = noise((G, *SHAPE))
    latents, log_probs, finished = branch_sample(counting, ddim(), x_T, noise, tree=tree, window=window)
    assert latents.shape == (G, 6, 5, *SHAPE)
    assert calls == [G, 2 * G, 2 * G, 6 * G, 6 * G, 6 * G]
    for g in range(G):
        for leaf in range(6):
            edge, x, states, scores = leaf // 3, x_T[g : g + 1], [], []
            for i, row in enumerate((g, *[2 * g + edge] * 2, *[6 * g + leaf] * 3)):
                states.append(x)
                mu, sigma = transition(ddim(), i, x, elementwise(x, i))
                x = mu + sigma * noise.drawn[i + 1][row : row + 1]
                scores.append(log_prob(x, mu, sigma))
            assert torch.equal(latents[g, leaf], torch.cat(states[1:6]))
            assert torch.equal(log_probs[g, leaf], torch.cat(scores[1:5]))
            assert torch.equal(finished[g, leaf], x[0])
    for step, distinct in enumerate((1, 2, 2, 6, 6)):
        assert len(latents[0, :, step].flatten(1).unique(dim=0)) == distinct


def test_variance_and_covariance_of_siblings_follow_the_exact_recursion():
    """With a linear network the state is Gaussian: its variance obeys v' = c^2 v + sigma^2, and two siblings covary by
    what their prefix gave them, carried on by the c^2 alone."""
    num_groups, split = 40_000, 3
    generator = torch.Generator().manual_seed(0)
    table = ddim()

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents, _, _ = branch_sample(
        lambda x, i: 0.5 * x, table, noise((num_groups, 1, 1, 1)), noise, tree=Tree((2,)), window=Window(split, T)
    )
    variance, covariance = 1.0, 1.0
    for i in range(T):
        one = torch.ones(1, 1)
        mu, sigma = transition(table, i, one, 0.5 * one)
        variance = mu.item() ** 2 * variance + sigma.item() ** 2
        covariance = mu.item() ** 2 * covariance + (sigma.item() ** 2 if i < split else 0.0)
    found = torch.cov(latents[:, :, -1].flatten(1).T)
    torch.testing.assert_close(found.diag(), torch.tensor([variance, variance]), rtol=0.03, atol=0)
    assert abs(found[0, 1].item() - covariance) < 0.03 * variance
    assert covariance > 0.1 * variance
