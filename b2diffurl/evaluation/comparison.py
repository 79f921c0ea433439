"""Two experiments compared on the same noise, image by image.

Experiments may have been trained on anything; what counts is how their newest stages were judged. Two evaluations pair if
their conditions are equal, or if the base model drew the very same images in both: then model, prompts, noise and sampler
were the same. A figure is compared if it is the same in both: a scorer is, if it gave the base model's images equal scores.

N images
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from b2diffurl.configuration.settings import describe_reward
from b2diffurl.evaluation.intervals import Interval, change
from b2diffurl.evaluation.statistics import diversities
from b2diffurl.experiment.evaluation_table import every_evaluation
from b2diffurl.experiment.stage_table import Row
from b2diffurl.runtime import files


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
    return bool(one.base and other.base) and one.base["images_sha256"] == other.base["images_sha256"]


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
    return None not in before and alike(*before)


def value_of(result: Mapping[str, Any], key: str) -> list[float | None] | dict[str, float] | None:
    """A figure of a result: a value for each image [N], or of a diversity for each prompt; None if the result lacks it."""
    return result["values"].get(key) or dict(diversities(result)).get(key)


def alike(one: Any, other: Any) -> bool:
    """Whether two lists, or two dicts by prompt, have the same values but for rounding."""
    if type(one) is not type(other) or len(one) != len(other) or (isinstance(one, dict) and one.keys() != other.keys()):
        return False
    pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else zip(one, other, strict=True)
    return all(
        new is old if None in (new, old) else math.isclose(new, old, rel_tol=1e-4, abs_tol=1e-5) for new, old in pairs
    )
