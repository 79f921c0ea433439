"""How different the images of one prompt are.

N images, E features each
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def mean_pairwise_distance(features: Tensor, groups: Sequence[str], *, metric: str) -> dict[str, float]:
    """Mean distance between two different rows of one group, for each group that has two or more.

    features [N,E]; `groups` [N] names the group (the prompt) of each row; `metric` is `euclidean`, or `cosine` for one
    minus the cosine similarity. Rows that are not finite are left out: those images have no such features. Every pair
    counts once, so that the mean does not depend on how many images a prompt has.
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"unknown metric {metric!r}; known: euclidean, cosine")
    found = {}
    for group, rows in grouped_rows(features, groups).items():
        if len(rows) > 1:
            distances = torch.pdist(rows) if metric == "euclidean" else torch.pdist(normalize(rows)) ** 2 / 2
            found[group] = distances.mean().item()
    return found


def vendi_score(features: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Effective number of different rows in each group (Friedman and Dieng 2022, arXiv 2210.02410, definition 3.1).

    features [N,E], `groups` [N] as above. The exponential of the entropy of the eigenvalues of k / n, k the cosine
    similarities of the group's n finite rows, two or more: 1 if all are alike, n if no two have anything in common. It grows
    with n, so compare only groups of equal size.
    """
    found = {}
    for group, rows in grouped_rows(features, groups).items():
        if len(rows) > 1:
            unit = normalize(rows)
            shares = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(0)
            found[group] = torch.special.entr(shares).sum().exp().item()
    return found


def inception_score(probabilities: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Inception Score of each group (Salimans et al. 2016, arXiv 1606.03498, section 4): exp of mean KL(p(y|x) || p(y)).

    probabilities [N,E] are a classifier's p(y|x), `groups` [N] as above, and p(y) is their mean in the group. 1 if all its
    images are classified alike, E at most. It grows with n, too.
    """
    found = {}
    for group, rows in grouped_rows(probabilities, groups).items():
        if len(rows) > 1:
            entropy = torch.special.entr(rows.mean(0)).sum() - torch.special.entr(rows).sum(1).mean()
            found[group] = entropy.exp().item()
    return found


def grouped_rows(features: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """The finite rows of each group, float64; groups without any are left out."""
    members: dict[str, list[int]] = {}
    for n, (group, known) in enumerate(zip(groups, features.isfinite().all(1).tolist(), strict=True)):
        if known:
            members.setdefault(group, []).append(n)
    return {group: features[rows].double() for group, rows in members.items()}
