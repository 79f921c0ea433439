"""Two experiments compared on the same noise, image by image.

Experiments may have been trained on anything; what counts is how their newest stages were judged. Two evaluations pair if
their conditions are equal, or if the base model drew the very same images in both: then model, prompts, noise and sampler
were the same. They pair, too, if nothing that images follow from differs and the base model's figures are the same but for
rounding, as with another number of threads. A figure is compared if it is the same in both: a scorer is, if it gave the base
model's images equal scores.

N images
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from b2diffurl.configuration.recorded import exchanged
from b2diffurl.configuration.settings import describe_reward
from b2diffurl.evaluation.intervals import Interval, change
from b2diffurl.evaluation.statistics import diversities
from b2diffurl.experiment.evaluation_table import describe_sampler, every_evaluation
from b2diffurl.experiment.stage_table import Row
from b2diffurl.runtime import files

# Keys of run_eval.py that a sampler's facts come from.
SAMPLER_KEYS = ("num_steps", "eta", "guidance_scale", "scheduler", "sde")


@dataclass(frozen=True)
class Rounding:
    """How far two values may lie apart that are the same but for rounding, and which share of them farther."""

    relative: float
    absolute: float
    share: float


ROUNDING = Rounding(1e-4, 1e-5, 0.0)  # scores of the very same images
# Scores of images that another number of threads has rounded otherwise: 1 in 50 may tip over, as a judge's yes to a no.
ROUNDING_OF_IMAGES = Rounding(1e-3, 1e-3, 0.02)


@dataclass(frozen=True)
class Judged:
    """The newest stage of an experiment that was judged under some conditions, and the base model under the same ones."""

    root: Path
    row: Row  # of eval.jsonl
    base_row: Row | None

    @cached_property
    def record(self) -> dict[str, Any]:
        """The experiment's config.json."""
        return files.read_json(self.root / "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @cached_property
    def result(self) -> dict[str, Any]:
        """What was measured, with the values of every image."""
        return files.read_json(self.root / self.row["folder"] / "result.json")

    @cached_property
    def base(self) -> dict[str, Any] | None:
        """The same of the base model; None if it was not judged, or by a version that did not record its images."""
        found = self.base_row and files.read_json(self.root / self.base_row["folder"] / "result.json")
        return found if found and found.get("images_sha256") else None

    @property
    def seed(self) -> int:
        """eval.seed. Evaluations of earlier versions do not have it; config.json says what it was meant to be."""
        return self.row.get("seed", self.config["eval"]["seed"])

    @property
    def batch_size(self) -> int:
        """eval.batch_size, which the noise of an image depends on; see `seed`."""
        return self.row.get("batch_size", self.config["eval"]["batch_size"])

    @cached_property
    def figures(self) -> dict[str, str]:
        """{name: key} of what can be compared; a single reward has its own name, as where it is watched."""
        values = self.result["values"]
        names = {key: key for key in values if "/" not in key and key != "reward"}
        own = {describe_reward(self.config["reward"]): "reward"} if "reward" in values else {}
        return names | own | {name: name for name, _ in diversities(self.result)}


@dataclass(frozen=True)
class Compared:
    """A figure of two experiments, and the second one's minus the first one's, paired."""

    figure: str
    keys: tuple[str, str]  # of the figure in the two results
    change: Interval

    @property
    def is_diversity(self) -> bool:
        return self.figure.startswith("diversity/")


def judged_of(root: Path, damaged: list[str] | None = None) -> list[Judged]:
    """Every evaluation of a newest stage, the newest stage's first; of equal ones those under which most was judged."""
    groups: dict[tuple, list[Row]] = {}
    for row in every_evaluation(root, damaged):
        if row["checkpoint"] == ("base" if row["stage"] is None else f"stage{row['stage']}"):  # no average, no earlier epoch
            groups.setdefault((row["prompts"], row["sampler"], row["conditions"]), []).append(row)
    found = []
    for rows in groups.values():
        tuned = [row for row in rows if row["stage"] is not None]
        if tuned:
            base = next((row for row in rows if row["stage"] is None), None)
            found.append((len(rows), Judged(root, max(tuned, key=lambda row: row["stage"]), base)))
    return [one for _, one in sorted(found, key=lambda pair: (-pair[1].row["stage"], -pair[0]))]


def same_noise(one: Judged, other: Judged) -> bool:
    """Whether image n of both is of the same prompt and starts from the same noise, by the same base model and sampler."""
    if one.row["conditions"] == other.row["conditions"]:
        return True
    if not (one.base and other.base):
        return False
    return one.base["images_sha256"] == other.base["images_sha256"] or same_but_for_rounding(one, other)


def same_but_for_rounding(one: Judged, other: Judged) -> bool:
    """Whether the base model drew images in both that only rounding tells apart: all that they follow from is the same, and
    so is a figure of single images."""
    models = [each.record.get("base_model") for each in (one, other)]
    if not all(models) or exchanged(*models) or judged_otherwise(one, other):
        return False
    shared = [name for name in one.figures if name in other.figures and not name.startswith("diversity/")]
    return any(same_figure(one, other, one.figures[name], other.figures[name]) for name in shared)


def judged_otherwise(first: Judged, second: Judged) -> list[str]:
    """In what the two evaluations differ, in words: prompts, number of images, sampler, noise."""
    found = []
    if first.result["n_images"] != second.result["n_images"]:
        found.append(f"{first.result['n_images']} and {second.result['n_images']} images were drawn (eval.num_images)")
    few = min(first.result["n_images"], second.result["n_images"])
    if first.result["shown_prompts"][:few] != second.result["shown_prompts"][:few]:
        found.append("the prompts are others (eval.prompt_file)")
    if any(first.row.get(key) != second.row.get(key) for key in SAMPLER_KEYS):
        found.append(f"the samplers are others ({describe_sampler(first.row)}; {describe_sampler(second.row)})")
    for key, values in {"seed": (first.seed, second.seed), "batch_size": (first.batch_size, second.batch_size)}.items():
        if values[0] != values[1]:
            found.append(f"the noise is another (eval.{key} {values[0]} and {values[1]})")
    return found


def compare(first: Judged, second: Judged) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    """(the figures that are the same in both, compared; the names of those that are not)."""
    prompts, found, others = first.result["shown_prompts"], [], []
    for name in dict.fromkeys([*first.figures, *second.figures]):
        keys = first.figures.get(name), second.figures.get(name)
        if None in keys or not same_figure(first, second, *keys):
            others.append(name)
            continue
        before, after = (value_of(one.result, key) for one, key in zip((first, second), keys, strict=True))
        if isinstance(before, dict):
            shared = [prompt for prompt in before if prompt in after]
            before, after = ([some[prompt] for prompt in shared] for some in (before, after))
        difference = change(after, before, shared if name.startswith("diversity/") else prompts)
        if difference:
            found.append(Compared(name, keys, difference))
    order = {"accuracy": 0, describe_reward(second.config["reward"]): 1}
    found.sort(key=lambda one: (one.is_diversity, order.get(one.figure, 2)))
    return tuple(found), tuple(others)


def same_figure(first: Judged, second: Judged, *keys: str) -> bool:
    """Whether the figures of these keys are one: so they are under equal conditions, or if the base has equal values."""
    if first.row["conditions"] == second.row["conditions"]:
        return keys[0] == keys[1]
    before = [value_of(one.base, key) for one, key in zip((first, second), keys, strict=True)]
    same_images = first.base["images_sha256"] == second.base["images_sha256"]
    return None not in before and alike(*before, ROUNDING if same_images else ROUNDING_OF_IMAGES)


def value_of(result: Mapping[str, Any], key: str) -> list[float | None] | dict[str, float] | None:
    """A figure of a result: a value for each image [N], or of a diversity for each prompt; None if the result lacks it."""
    return result["values"].get(key) or dict(diversities(result)).get(key)


def alike(one: Any, other: Any, rounding: Rounding) -> bool:
    """Whether two lists, or two dicts by prompt, have the same values but for rounding."""
    if type(one) is not type(other) or len(one) != len(other) or (isinstance(one, dict) and one.keys() != other.keys()):
        return False
    pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else zip(one, other, strict=True)
    others = sum(
        new is not old
        if None in (new, old)
        else not math.isclose(new, old, rel_tol=rounding.relative, abs_tol=rounding.absolute)
        for new, old in pairs
    )
    return others <= rounding.share * len(one)
