"""The best of several checkpoints: chosen by some prompts and judged by others.

The best of many is best by chance, too. So its figure on the prompts that it was chosen by flatters, the more the more
checkpoints there are; its figure on other prompts does not.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from b2diffurl.evaluation.intervals import Interval, change, interval
from b2diffurl.runtime import files

Result = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The checkpoint that was chosen, and how good it is."""

    best: Result  # its result on the prompts that it is judged by
    figure: str  # accuracy, or reward without a judge
    num_checkpoints: int
    chosen_by: tuple[str, int]  # the prompt set, and how many of its prompts
    judged_by: tuple[str, int]
    flattering: Interval  # its figure on the prompts that it was chosen by
    fair: Interval  # its figure on the others
    over_base: Interval | None  # what it gains on the others over the base model, and over the last checkpoint
    over_last: Interval | None

    def to_json(self) -> dict[str, Any]:
        def ends(found: Interval | None) -> dict[str, Any] | None:
            return found and {"mean": found.mean, "se": found.error, "low": found.low, "high": found.high}

        parts = {"chosen_by": self.chosen_by, "judged_by": self.judged_by}
        named = {name: {"prompts": prompts, "n_prompts": count} for name, (prompts, count) in parts.items()}
        named["chosen_by"] |= ends(self.flattering)
        named["judged_by"] |= ends(self.fair)
        gains = {"gain_over_base": ends(self.over_base), "gain_over_last": ends(self.over_last)}
        facts = {"checkpoint": self.best["checkpoint"], "lora": self.best["lora"], "figure": self.figure}
        return facts | {"num_checkpoints": self.num_checkpoints} | named | gains


def choose(results: Sequence[Result], sampler: str, *, seed: int, validation: str = "") -> Choice:
    """The result with the highest accuracy, or reward without a judge, of those with `sampler`; of equals the earliest.

    They are chosen on the prompt set `validation` and judged on held-out prompts (or on the first other set), without those
    that are in both. Without one, half of those prompts choose and the other half judges (`half`).
    """
    results = [row for row in results if row["sampler"] == sampler]
    sets = [name for name in dict.fromkeys(row["prompts"] for row in results) if name != validation]
    judged_set = "test" if "test" in sets else sets[0]
    judging = [row for row in results if row["prompts"] == judged_set]
    choosing = [row for row in results if row["prompts"] == validation] if validation else judging
    figure = "accuracy" if "accuracy" in judging[0]["values"] else "reward"
    first, other = set(choosing[0]["shown_prompts"]), set(judging[0]["shown_prompts"])
    if not validation:
        first = half(other, seed)
    other -= first
    means = [estimate(row, figure, first) for row in choosing]
    best = max(range(len(choosing)), key=lambda n: means[n].mean)
    ends = {row["checkpoint"]: row for row in (judging[0], judging[-1]) if row is not judging[best]}

    def gain(over: str) -> Interval | None:
        return change_on(judging[best], ends[over], figure, other) if over in ends else None

    return Choice(
        best=judging[best],
        figure=figure,
        num_checkpoints=len(choosing),
        chosen_by=(validation or judged_set, len(first)),
        judged_by=(judged_set, len(other)),
        flattering=means[best],
        fair=estimate(judging[best], figure, other),
        over_base=gain("base"),
        over_last=None if judging[-1]["checkpoint"] == "base" else gain(judging[-1]["checkpoint"]),
    )


def half(prompts: Collection[str], seed: int) -> set[str]:
    """Half of the prompts, drawn by `seed`; neither their order nor repetitions count."""
    ranked = sorted(set(prompts), key=lambda prompt: files.digest([seed, prompt]))
    return set(ranked[: len(ranked) // 2])


def estimate(result: Result, figure: str, prompts: Collection[str]) -> Interval:
    """A figure of a result over its images of some prompts."""
    shown = result["shown_prompts"]
    return interval([v if p in prompts else None for v, p in zip(result["values"][figure], shown, strict=True)], shown)


def change_on(after: Result, before: Result, figure: str, prompts: Collection[str]) -> Interval | None:
    """What a figure gains from one result to another, on the same noise, over images of some prompts."""
    shown = after["shown_prompts"]
    kept = [v if p in prompts else None for v, p in zip(after["values"][figure], shown, strict=True)]
    return change(kept, before["values"][figure], shown)
