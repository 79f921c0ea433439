"""The figures of benchmarks.learning, from evaluations' results with a value for each image.

A course is a run's results in the order of training, those of the base first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from b2diffurl.evaluation.statistics import add_differences, mean_and_error, paired_difference
from config.stage_process import get_config


def with_gains(preset: str, results: Sequence[dict]) -> list[dict]:
    """Base and checkpoints, each with its gain over the base and the number of images scored up to it."""
    config = get_config(preset)
    per_stage = config.sample.num_batches_per_epoch * config.sample.batch_size * config.split_time
    course = [dict(result) for result in results]
    add_differences(course)
    for result in course:
        stage = result["checkpoint"].removeprefix("stage")
        result["queries"] = (int(stage) + 1) * per_stage if stage.isdigit() else 0
    return course


def ends(course: Sequence[dict], prompts: str) -> tuple[dict, dict]:
    """The base's result and that of the last stage on a prompt set."""
    results = [result for result in course if result["prompts"] == prompts]
    return results[0], results[-1]


def plain(result: dict) -> dict:
    """A result without its values for single images, and without paths."""
    return {
        key: value for key, value in result.items() if isinstance(value, float | int) or key in ("checkpoint", "prompts")
    }


def mean_gain(courses: Sequence[Sequence[dict]], prompts: str) -> dict[str, float]:
    """Mean gain in accuracy over the seeds, with two standard errors.

    Both are of the gain averaged over seeds: `se` treats images as independent, `se_by_prompt` only prompts.
    """
    pairs = [ends(course, prompts) for course in courses]
    before, after = (torch.tensor([pair[n]["values"]["accuracy"] for pair in pairs], dtype=torch.float64) for n in range(2))
    change, num_prompts = (after - before).mean(0), pairs[0][0]["n_prompts"]
    by_prompt = [change[n::num_prompts].mean().item() for n in range(num_prompts)]
    gain, error = mean_and_error(change.tolist())
    return {"gain": gain, "se": error, "se_by_prompt": mean_and_error(by_prompt)[1]}


def failures(course: Sequence[dict], prompts: str) -> dict[str, dict[str, float]]:
    """The shares of images by the first thing that is wrong, for base and tuned model.

    The four shares add up to 1, so the changes of the first three explain the gain.
    """
    before, after = (split_by_failure(result["values"]) for result in ends(course, prompts))
    found = {}
    for kind in before:
        change, error = paired_difference(after[kind].tolist(), before[kind].tolist())
        found[kind] = {"base": before[kind].mean().item(), "tuned": after[kind].mean().item(), "change": change, "se": error}
    return found


def split_by_failure(values: dict[str, list[float]]) -> dict[str, Tensor]:
    """{kind: 1 or 0 for each image}, 1 at the first thing that is wrong with it: form, binding, relation.

    `right` is 1 where nothing is wrong.
    """
    formed, bound, right = (
        torch.tensor(values[key], dtype=torch.float64) for key in ("shapes/well_formed", "shapes/binding", "accuracy")
    )
    return {"malformed": 1 - formed, "binding": formed - bound, "relation": bound - right, "right": right}


def against(before: dict, after: dict) -> dict[str, Any]:
    """Accuracy of `after`, and its paired gain over `before`.

    An image has the same prompt and initial noise with every sampler, so the difference of two samplers is paired, too.
    """
    gain, error = paired_difference(after["values"]["accuracy"], before["values"]["accuracy"])
    return {"accuracy": after["accuracy"], "accuracy_gain": gain, "accuracy_gain_se": error}
