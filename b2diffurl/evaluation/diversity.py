"""Measures of how different the images of one prompt are.

N images, E features each
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def mean_pairwise_distance(features: Tensor, groups: Sequence[str], *, metric: str) -> dict[str, float]:
    """Mean distance between two rows of a group, for each group with at least two finite rows.

    features [N,E]; `groups` [N] is the group (the prompt) of each row. `metric` is `euclidean`, or `cosine` for one minus
    the cosine similarity. Rows that are not finite are left out: those images have no such features. A row is not paired
    with itself, so the expected mean does not depend on the number of images.
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"unknown metric {metric!r}; known: euclidean, cosine")
    means = {}
    for group, rows in grouped_rows(features, groups).items():
        if len(rows) > 1:
            # For unit vectors 1 - <u, v> = |u - v|^2 / 2.
            distances = torch.pdist(rows) if metric == "euclidean" else torch.pdist(normalize(rows)) ** 2 / 2
            means[group] = distances.mean().item()
    return means


def vendi_score(features: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Effective number of different rows in each group (Friedman and Dieng 2022, arXiv 2210.02410, definition 3.1).

    features [N,E], `groups` [N] as above. The score is exp of the entropy of the eigenvalues of k / n, where k are the
    cosine similarities of a group's n >= 2 finite rows. It is 1 if all rows are alike and n if they are orthogonal. It grows
    with n, so compare only groups of equal size.
    """
    scores = {}
    for group, rows in grouped_rows(features, groups).items():
        if len(rows) > 1:
            unit = normalize(rows)
            eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(0)  # rounding makes some negative
            scores[group] = torch.special.entr(eigenvalues).sum().exp().item()
    return scores


def inception_score(probabilities: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Inception Score of each group (Salimans et al. 2016, arXiv 1606.03498, section 4): exp of mean KL(p(y|x) || p(y)).

    probabilities [N,E] are a classifier's p(y|x), and p(y) is their mean in the group; `groups` [N] as above. The score is 1
    if all images of the group are classified alike, and E at most. It grows with the number of images, too.
    """
    scores = {}
    for group, rows in grouped_rows(probabilities, groups).items():
        if len(rows) > 1:
            # The mean KL is the entropy of the mean minus the mean of the entropies.
            mean_kl = torch.special.entr(rows.mean(0)).sum() - torch.special.entr(rows).sum(1).mean()
            scores[group] = mean_kl.exp().item()
    return scores


def grouped_rows(features: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """The finite rows of each group, float64. A group without any is left out."""
    members: dict[str, list[int]] = {}
    for n, (group, is_finite) in enumerate(zip(groups, features.isfinite().all(1).tolist(), strict=True)):
        if is_finite:
            members.setdefault(group, []).append(n)
    return {group: features[rows].double() for group, rows in members.items()}
