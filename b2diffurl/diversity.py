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
    members: dict[str, list[int]] = {}
    for n, (group, known) in enumerate(zip(groups, features.isfinite().all(1).tolist(), strict=True)):
        if known:
            members.setdefault(group, []).append(n)
    features = features.double()
    if metric == "cosine":
        features = normalize(features)
    elif metric != "euclidean":
        raise ValueError(f"unknown metric {metric!r}; known: euclidean, cosine")
    distances = {group: torch.pdist(features[rows]) for group, rows in members.items() if len(rows) > 1}
    if metric == "cosine":
        distances = {group: distance**2 / 2 for group, distance in distances.items()}  # of unit vectors
    return {group: distance.mean().item() for group, distance in distances.items()}
