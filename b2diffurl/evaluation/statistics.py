"""Statistics of an evaluation's images: means, standard errors, paired differences to the base model.

N images. A value that is not finite is None in a result, because JSON has no NaN.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from b2diffurl.configuration.settings import Rewards
from b2diffurl.evaluation.diversity import inception_score, mean_pairwise_distance, vendi_score
from b2diffurl.rewards.mixture import Scales, combine


def summarise(
    rewards: Rewards,
    judge: str,
    values: Mapping[str, Tensor],
    scales: Scales | None,
    image_prompts: list[str],
    num_prompts: int,
) -> dict[str, Any]:
    """The figures of an evaluation: of each its mean, its standard error (`<figure>_se`), and its value for every image.

    `values` holds each reward [N] by its name, and its parts [N] by `<name>/<part>`. `reward` is what is trained on, and
    `accuracy` is the reward that `judge` names. All parts, watched rewards and the rewards of a mixture stand under their
    own names, too. A reward that lacks images has the mean of those it has scored, and their number as
    `<figure>_n`. `image_prompts` [N] are the images' prompts, taken from a file of `num_prompts`.
    """
    kept: dict[str, Tensor] = {}
    if "file" not in rewards.weights:  # people or another program have scored the stage's images, but not these
        kept["reward"] = combine(values, rewards.weights, scales)
    if judge:
        kept["accuracy"] = values[judge]
    named = {*(rewards.weights if rewards.mixed else ()), *rewards.watched}
    kept |= {key: numbers for key, numbers in values.items() if "/" in key or key in named}
    # These are always there, None if there is nothing to tell, so that readers of a result need not ask.
    nothing = dict.fromkeys(("reward", "reward_se", "accuracy", "accuracy_se"))
    summary = {"n_images": len(image_prompts), "n_prompts": num_prompts} | nothing
    lists = {key: [value if math.isfinite(value) else None for value in numbers.tolist()] for key, numbers in kept.items()}
    for key, numbers in lists.items():
        summary[key], summary[f"{key}_se"] = mean_and_error(numbers)
        if (key in rewards.watched or key in nothing) and None in numbers:
            summary[f"{key}_n"] = len(numbers) - numbers.count(None)
    return summary | {"shown_prompts": image_prompts, "values": lists}


def summarise_diversity(
    features: Tensor, image_prompts: list[str], accuracy: list[float | None] | None, metric: str
) -> dict[str, dict[str, float]]:
    """Measures of the diversity of features [N,E]: {name of the measure: {prompt: value}}.

    For `classes` the one measure, `all`, is the Inception Score. For other metrics `all` is the mean pairwise distance, and
    `right` the same among correct images, which have an `accuracy` [N] above 1/2. `cosine` adds `vendi`, the Vendi score.
    """
    if metric == "classes":
        return {"all": inception_score(features, image_prompts)}
    measures = {"all": mean_pairwise_distance(features, image_prompts, metric=metric)}
    if metric == "cosine":
        measures["vendi"] = vendi_score(features, image_prompts)
    # Wrong images differ from right ones. A model that makes fewer of them is less diverse for a good reason, so the right
    # ones are measured alone, too, if there is a judge.
    if accuracy is not None:
        rows = [n for n, value in enumerate(accuracy) if value is not None and value > 0.5]
        measures["right"] = mean_pairwise_distance(features[rows], [image_prompts[n] for n in rows], metric=metric)
    return measures


def mean_and_error(numbers: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error of the numbers that are not None. The error of one number, and both of none, are None."""
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return None, None
    tensor = torch.tensor(numbers, dtype=torch.float64)
    error = tensor.std().item() / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return tensor.mean().item(), error


def paired_difference(after: Sequence[float | None], before: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error of after - before, over the pairs in which neither is None."""
    pairs = zip(after, before, strict=True)
    return mean_and_error([new - old for new, old in pairs if new is not None and old is not None])


def add_differences(results: list[dict[str, Any]]) -> None:
    """Add to each result its mean diversities, and every figure's difference to the base: `<figure>_gain`, with its error.

    The base's result must have the same conditions. Values are paired by image, because images start from the same noise.
    Diversities are paired by prompt, over the prompts that both have; their own means are over all prompts.
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
                continue  # a part that a reward returns for some images only
            result[f"{key}_gain"], result[f"{key}_gain_se"] = paired_difference(numbers, against["values"][key])
        before = dict(diversities(against))
        for name, after in diversities(result):
            shared = [prompt for prompt in after if prompt in before[name]]
            gain = paired_difference([after[prompt] for prompt in shared], [before[name][prompt] for prompt in shared])
            result[f"{name}_gain"], result[f"{name}_gain_se"] = gain


def diversities(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, {prompt: value}) of each diversity in a result. Names are diversity/<features>, also with _right or _vendi."""
    for features, measures in result["diversity"].items():
        for measure, values in measures.items():
            yield f"diversity/{features}" + ("" if measure == "all" else f"_{measure}"), values
