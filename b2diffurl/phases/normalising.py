"""From a stage's rewards to the scores that decide what is trained on: each against its prompt's rewards, earlier ones too.

N images; D depths of the tree in which the branches of a group part, 1 if they part at once
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from b2diffurl.algorithm.advantages import correlation, edge_scores, normalise, weigh
from b2diffurl.configuration.settings import Settings
from b2diffurl.experiment.stage import Stage
from b2diffurl.phases.scoring import Scores
from b2diffurl.runtime import files


@dataclass(frozen=True)
class Normalised:
    """The scores of a stage's images: normalised rewards, relative to the prompt's mean or to that of the siblings."""

    scores: Tensor  # float32 [N]
    edges: Tensor  # float32 [N,D], those of the edges on an image's way
    shares: dict[str, float]  # by reward of a mixture: correlation of the scores by it alone with `scores`


def normalise_scores(
    settings: Settings, prompts: Sequence[str], scores: Scores, earlier_rows: Sequence[dict[str, Any]]
) -> Normalised:
    """Normalise a stage's rewards, of a mixture either their sum or each by itself (reward.combine).

    `earlier_rows` are the rows of earlier stages' scores.jsonl.
    """
    rewards, tree = settings.rewards, settings.sampling.tree
    num_siblings = {"prompt": 0, "group": tree.num_leaves}[settings.selection.baseline]
    whole = (scores.rewards, prompts, history(earlier_rows))
    names = rewards.weights if rewards.mixed else ()
    parts = {name: (scores.parts[name], prompts, history(earlier_rows, name)) for name in names}
    apart = rewards.combine == "advantages"
    trained, weights = (parts.values(), rewards.weights.values()) if apart else ([whole], [1.0])
    total = weigh([normalise(*one, num_siblings=num_siblings) for one in trained], weights)
    return Normalised(
        scores=total,
        edges=weigh([edge_scores(*one, num_siblings=num_siblings, tree=tree) for one in trained], weights),
        shares={name: correlation(normalise(*part, num_siblings=num_siblings), total) for name, part in parts.items()},
    )


def history(rows: Sequence[dict[str, Any]], part: str = "") -> list[tuple[str, float]]:
    """(prompt, reward) of earlier images; with `part` by that reward of a mixture, of the images that it has scored.

    Some lack it if the experiment went on with another mixture (allow_config_change).
    """
    values = [(row["prompt"], row["parts"].get(part) if part else row["reward"]) for row in rows]
    return [(prompt, value) for prompt, value in values if value is not None]


def read_rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The rows of these stages' scores.jsonl, one for each image."""
    rows = []
    for stage in stages:
        stage.verify("select", stage.scores.name)
        rows += files.read_json_lines(stage.scores)
    return rows
