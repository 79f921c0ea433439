"""Signs that a run goes wrong, in words: pure functions of what metrics and manifests hold of its stages.

Numbers that are not finite stop a run. These only warn: in the log when they happen, and in the manifest of the phase, from
which report and forecast take them. The same figures give the same words.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

FAR = 10.0  # times the median. In 13 runs of the embedded world that went well no update was beyond 6 (docs/evaluation.md)
MIN_UPDATES = 10  # before a median says what is usual
WINDOW = 100  # latest updates that it is of: those long ago trained fewer steps of another policy
MIN_LOG_RATIO = 1e-4  # DDPO's clip range, the smallest in use: below it no policy has moved far, whatever the median
MAX_SKIPPED = 10  # updates in a row; fp16's scale halves with each, and 10 of them make a thousandth of it
FEW = 0.1  # of groups: where no more than these have any spread of rewards, next to nothing says what to do better
MAX_FALL = 1.0  # standard deviations of rewards that a stage's mean may lie below the best before it
MAX_FALL_SE = 6.0  # and as many of them over the root of the number of groups, where these are few
MAX_TWINS = 0.05  # of groups: now and then two siblings may be equally blank

Warned = dict[str, str]  # kind: in two or three words; what: the figures; advice: what to try

ELSEWHERE = "a new experiment with resume_from at the last good stage's checkpoints"
ADVICE = {
    "Gradient norm": f"{ELSEWHERE} and a lower train.learning_rate, or train.max_grad_norm near that median; "
    "train.step_weight=sigma where grad_norm_per_step says that one step makes it",
    "Log-ratio": f"{ELSEWHERE} and a lower train.learning_rate, a smaller train.eps, or fewer updates a stage (larger "
    "train.batch_size, fewer train.num_epochs)",
    "Mean reward": f"looking at the stage's images, and {ELSEWHERE} and a lower train.learning_rate or a smaller train.eps",
    "First log-ratio": "sampling and training on the same device, in the same precision, with the same number of threads",
    "Skipped updates": "a new experiment with mixed_precision=bf16, or no: nothing is learnt from these",
    "Rewards of siblings": "looking at the stage's images: if they are as wanted the run is done; if the model has "
    f"collapsed, {ELSEWHERE} and a lower train.learning_rate; else a reward of finer steps, or more siblings (split_time)",
    "Identical images": f"looking at the stage's images: if they are blank the model has collapsed: {ELSEWHERE} and a "
    "lower train.learning_rate; else longer windows (split_step_left) or more noise (sample.eta)",
}


def warn(kind: str, what: str) -> Warned:
    return {"kind": kind, "what": what, "advice": ADVICE[kind]}


def in_words(one: Warned) -> str:
    return f"{one['what']}. Try {one['advice']}."


# ---- updates ----


@dataclass(frozen=True)
class Figure:
    """One of an update: can be compared with those of updates that trained the step which decides it."""

    value: float
    steps: tuple[int, ...] = ()  # timesteps that the update trained
    decisive: int | None = None  # None: no single one


@dataclass
class Measure:
    """A figure of a stage's updates, each compared with the running median of those before."""

    kind: str
    name: str
    read: Callable[[Mapping[str, Any]], Figure | None]
    usual: deque[Figure]
    floor: float = 0.0  # below it no value is far
    num_seen: int = 0
    num_far: int = 0
    worst: tuple[float, float] = (0.0, 0.0)  # (value, median)

    def see(self, update: Mapping[str, Any]) -> None:
        figure = self.read(update)
        if figure is None:
            return
        alike = [one.value for one in self.usual if figure.decisive is None or figure.decisive in one.steps]
        usual = median(alike) if len(alike) >= MIN_UPDATES else 0.0
        self.usual.append(figure)
        self.num_seen += 1
        if usual and figure.value > max(FAR * usual, self.floor):
            self.num_far += 1
            self.worst = max(self.worst, (figure.value, usual))

    def warnings(self) -> list[Warned]:
        if not self.num_far:
            return []
        value, usual = self.worst
        far = f"{self.num_far} of {self.num_seen} updates are above {FAR:g} times the median of those before"
        return [warn(self.kind, f"{self.name} up to {value:.2g}: {far}, {usual:.2g}")]


def gradient_norm(update: Mapping[str, Any]) -> Figure | None:
    return None if was_skipped(update) else Figure(update["grad_norm"])


def log_ratio(update: Mapping[str, Any]) -> Figure | None:
    """The mean of the step where it is largest, for that of a single transition is far from its median now and then in runs
    that go well. Not of a stage's first update, whose policy has not moved yet. One step makes it, as others do not where
    train.timestep_fraction leaves it out."""
    if update["first"]:
        return None
    by_step = dict(zip(update["timesteps"], update["log_ratio_per_step"], strict=True))
    decisive = max(by_step, key=by_step.get)
    return Figure(by_step[decisive], tuple(by_step), decisive)


def was_skipped(update: Mapping[str, Any]) -> bool:
    """By fp16's scaler, which skips an update whose gradient is not finite."""
    return update["grad_norm"] is None


class UpdateWatch:
    """Sees a stage's updates one after the other, as metrics/train.jsonl has them."""

    def __init__(self, earlier: Sequence[Mapping[str, Any]], *, clip_range: float):
        """`earlier`: the latest updates of the stages before, in order."""

        def measure(kind: str, name: str, read: Callable, **more: float) -> Measure:
            found = (read(update) for update in earlier)
            return Measure(kind, name, read, deque((figure for figure in found if figure), WINDOW), **more)

        self.measures = (
            measure("Gradient norm", "gradient norm", gradient_norm),
            measure("Log-ratio", "mean |log-ratio| of a step", log_ratio, floor=MIN_LOG_RATIO),
        )
        self.clip_range = clip_range
        self.first: list[Warned] = []
        self.skipped = len(list(takewhile(was_skipped, reversed(earlier))))  # in a row
        self.most_skipped = 0  # in a row, of which some were in this stage

    def see(self, update: Mapping[str, Any]) -> list[Warned]:
        """What this update gives cause to warn of, and none before it in the stage did."""
        known = {one["kind"] for one in self.warnings()}
        if update["first"] and update["max_abs_log_ratio"] > self.clip_range:
            what = f"max |log-ratio| {update['max_abs_log_ratio']:.1e} at the first update, where it should be about 0"
            self.first = [warn("First log-ratio", f"{what}, is beyond the clip range {self.clip_range:g}")]
        for measure in self.measures:
            measure.see(update)
        self.skipped = self.skipped + 1 if was_skipped(update) else 0
        self.most_skipped = max(self.most_skipped, self.skipped)
        return [one for one in self.warnings() if one["kind"] not in known]

    def warnings(self) -> list[Warned]:
        """Of the stage so far, at most one of a kind."""
        found = [*self.first, *(one for measure in self.measures for one in measure.warnings())]
        if self.most_skipped >= MAX_SKIPPED:
            found.append(warn("Skipped updates", f"{self.most_skipped} updates in a row were skipped, for fp16 overflowed"))
        return found


# ---- scored stages ----


def stage_warnings(earlier: Sequence[Mapping[str, Any]], scored: Mapping[str, Any]) -> list[Warned]:
    """Of a stage that has been scored, and `earlier` ones, as the manifests of their select phases have them."""
    return [*fallen_reward(earlier, scored), *groups_alike(earlier, scored)]


def fallen_reward(earlier: Sequence[Mapping[str, Any]], scored: Mapping[str, Any]) -> list[Warned]:
    best = max(earlier, key=lambda one: one["reward_mean"], default=scored)
    fall, spread = best["reward_mean"] - scored["reward_mean"], max(best["reward_std"], scored["reward_std"])
    if fall <= max(MAX_FALL, MAX_FALL_SE / math.sqrt(scored["num_groups"])) * spread:
        return []
    below = f"more than {MAX_FALL:g} standard deviation below that of stage {best['stage']}, {best['reward_mean']:.3g}"
    return [warn("Mean reward", f"mean reward {scored['reward_mean']:.3g}, {below}")]


def groups_alike(earlier: Sequence[Mapping[str, Any]], scored: Mapping[str, Any]) -> list[Warned]:
    found = []
    flat, twins, groups = (scored[key] for key in ("num_flat_groups", "num_twin_groups", "num_groups"))
    spread = median(1 - one["num_flat_groups"] / one["num_groups"] for one in earlier) if earlier else 0.0
    lost = groups - flat <= FEW * groups and spread >= 2 * FEW  # twice: a reward of 0 or 1 goes to and fro about any limit
    if flat == groups or lost:
        before = f", usual before: {1 - spread:.0%}" if earlier else ""
        what = f"rewards are the same for all siblings in {flat} of {groups} groups"
        found.append(warn("Rewards of siblings", what + before))
    if twins > MAX_TWINS * groups:
        found.append(warn("Identical images", f"{twins} of {groups} groups have siblings whose images are identical"))
    return found
