"""What the images of an evaluation say: means, standard errors, differences to the base on the same noise.

N images; a value that is not finite is None
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from b2diffurl.configuration.settings import Rewards
from b2diffurl.evaluation.diversity import inception_score, mean_pairwise_distance, vendi_score
from b2diffurl.experiment.evaluation_table import with_error
from b2diffurl.rewards.mixture import Scales, combine
from b2diffurl.runtime.logs import logger


def summarise(
    rewards: Rewards,
    judge: str,
    values: Mapping[str, Tensor],
    scales: Scales | None,
    asked: list[str],
    num_prompts: int,
) -> dict[str, Any]:
    """Means, errors and values of every reward's `values` [N], by its name, and of its parts, by `<name>/<part>`.

    `reward` is what is trained on, and `accuracy` what `judge` says. The parts of a mixture and watched rewards stand under
    their own names.
    """
    kept: dict[str, Tensor] = {}
    if "file" not in rewards.weights:  # which has no scores for new images
        kept["reward"] = combine(values, rewards.weights, scales)
    if judge:
        kept["accuracy"] = values[judge]
    named = {*(rewards.weights if rewards.mixed else ()), *rewards.watched}
    kept |= {key: numbers for key, numbers in values.items() if "/" in key or key in named}
    nothing = dict.fromkeys(("reward", "reward_se", "accuracy", "accuracy_se"))
    summary = {"n_images": len(asked), "n_prompts": num_prompts} | nothing
    lists = {key: [value if math.isfinite(value) else None for value in numbers.tolist()] for key, numbers in kept.items()}
    for key, numbers in lists.items():
        summary[key], summary[f"{key}_se"] = mean_and_error(numbers)
    return summary | {"shown_prompts": asked, "values": lists}


def summarise_diversity(
    features: Tensor, asked: list[str], right: list[float] | None, metric: str
) -> dict[str, dict[str, float]]:
    """Diversity of features [N,E], by prompt: of class probabilities the Inception Score; of others the mean pairwise
    distance of all its images, where there is a judge that of the right ones alone, and of a cosine also the Vendi score.

    Right is what the judge gives more than 1/2. Wrong images differ from right ones, so a model that makes fewer of them is
    less diverse for a good reason.
    """
    if metric == "classes":
        return {"all": inception_score(features, asked)}
    found = {"all": mean_pairwise_distance(features, asked, metric=metric)}
    if metric == "cosine":
        found["vendi"] = vendi_score(features, asked)
    if right is not None:
        rows = [n for n, value in enumerate(right) if value > 0.5]
        found["right"] = mean_pairwise_distance(features[rows], [asked[n] for n in rows], metric=metric)
    return found


def mean_and_error(numbers: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error, of those that are numbers; None of nothing, and no error of one."""
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return None, None
    tensor = torch.tensor(numbers, dtype=torch.float64)
    error = tensor.std().item() / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return tensor.mean().item(), error


def paired_difference(after: Sequence[float | None], before: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean of after - before, value by value where both are numbers, and its standard error."""
    pairs = zip(after, before, strict=True)
    return mean_and_error([new - old for new, old in pairs if new is not None and old is not None])


def add_differences(results: list[dict[str, Any]]) -> None:
    """Beside each checkpoint's figures the mean paired difference to the base under the same conditions, and its error.

    Values are paired by image. Diversity is paired by prompt, over those that both have; its mean is over all that it has.
    """
    base = {result["conditions"]: result for result in results if result["checkpoint"] == "base"}
    for result in results:
        for name, groups in list(diversities(result)):
            result[name], result[f"{name}_se"] = mean_and_error(list(groups.values()))
        against = base.get(result["conditions"])
        if against is None or result is against:
            continue
        for key, numbers in result["values"].items():
            if key not in against["values"]:
                continue  # a part that a reward gives for some images alone
            result[f"{key}_gain"], result[f"{key}_gain_se"] = paired_difference(numbers, against["values"][key])
        before = dict(diversities(against))
        for name, after in diversities(result):
            both = [prompt for prompt in after if prompt in before[name]]
            gain = paired_difference([after[prompt] for prompt in both], [before[name][prompt] for prompt in both])
            result[f"{name}_gain"], result[f"{name}_gain_se"] = gain


def diversities(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, figure by prompt) of each diversity in a result: diversity/<features>, and with _right or _vendi after it."""
    for features, found in result["diversity"].items():
        for which, groups in found.items():
            yield f"diversity/{features}" + ("" if which == "all" else f"_{which}"), groups


def name_best(results: Sequence[dict[str, Any]], sampler: str) -> dict[str, Any]:
    """Of the results with that sampler on held-out prompts, or if there are none on the first set, that with the highest
    accuracy where there is a judge, else reward; the earliest of equals. It is logged."""
    sets = [result["prompts"] for result in results]
    prompts = "test" if "test" in sets else sets[0]
    results = [row for row in results if (row["sampler"], row["prompts"]) == (sampler, prompts)]
    figure = "accuracy" if results[0]["accuracy"] is not None else "reward"
    judged = [result for result in results if result[figure] is not None]
    if not judged:
        raise ValueError("neither a reward nor a judge scored these images, so none of them is best; see eval.judge")
    found = max(judged, key=lambda result: result[figure])
    what = f"{figure} {with_error(found, figure)} on {found['prompts']} prompts"
    logger.info("eval best of %d checkpoints: %s, %s; %s", len(judged), found["checkpoint"], what, found["lora"])
    return found
