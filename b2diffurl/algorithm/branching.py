"""Branch-based sampling (arXiv 2503.11240, section 4.2): denoise one prefix, then continue it in K branches.

The branches may part at once, or in a tree, some of them later (BranchGRPO, arXiv 2509.06040; TreeGRPO, 2512.08153). Every
step adds the noise that the policy has, at a parting as elsewhere, so that its log-probability is the policy's.

G groups (one prefix each), K branches, N = G*K rows in group-major order (row g*K + k)
T sampler steps, S of them trained: the window
"""

from torch import Tensor

from b2diffurl.algorithm.transition import Transitions, log_prob, transition
from b2diffurl.algorithm.tree import Tree, to_leaves
from b2diffurl.algorithm.types import Noise, Predict
from b2diffurl.algorithm.window import Window


def denoise(predict: Predict, table: Transitions, x: Tensor, noise: Noise, steps: range) -> Tensor:
    """Run `steps` of the sampler from x [N,C,H,W] and return the state after them, [N,C,H,W]."""
    for i in steps:
        mu, sigma = transition(table, i, x, predict(x, i))
        x = mu + sigma * noise(x.shape)
    return x


def branch_sample(
    predict: Predict, table: Transitions, x_T: Tensor, noise: Noise, *, tree: Tree, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Denoise G prefixes from x_T [G,C,H,W], and part each into the K leaves of `tree` on its way through the window.

    Returns the S+1 states of the window, latents [G,K,S+1,C,H,W], log_probs [G,K,S] of its transitions, and the finished
    latents [G,K,C,H,W], all float32. A state that leaves share is repeated there, but `predict` sees it once: G rows in the
    prefix, then a row for each edge of the tree.
    """
    assert tree.starts[-1] < window.num_steps, "the last parting would train nothing"
    x = denoise(predict, table, x_T, noise, range(window.start))
    latents, log_probs = [], []
    for step in range(window.num_steps):
        if step in tree.starts:
            x = x.repeat_interleave(tree.children[tree.depth(step)], dim=0)
        latents.append(x)
        mu, sigma = transition(table, window.start + step, x, predict(x, window.start + step))
        x = mu + sigma * noise(x.shape)
        # Of the state as it is stored, so that training on it finds an importance ratio of 1.
        log_probs.append(log_prob(x, mu, sigma))
    finished = denoise(predict, table, x, noise, range(window.stop, table.num_steps))
    grouped = (len(x_T), tree.num_leaves)
    of_leaves = (to_leaves([*latents, x], len(x)), to_leaves(log_probs, len(x)), finished)
    return (*(each.unflatten(0, grouped) for each in of_leaves),)
