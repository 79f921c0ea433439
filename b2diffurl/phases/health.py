"""Warnings that a run goes wrong: pure functions of the metrics and manifests of its stages.

Numbers that are not finite stop a run. These signs only warn: in the log as soon as they show, and in the phase's manifest,
where the report and the forecast find them. The same figures give the same words, so a repeated phase warns alike.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

from b2diffurl.evaluation import hacking
from b2diffurl.evaluation.hacking import Estimate, Look

# An update is far off above so many times the median. In 13 good runs of the shapes world none was above 6 (evaluation.md).
FAR = 10.0
MIN_UPDATES = 10  # a median of fewer updates does not say what is usual
WINDOW = 100  # the median is of so many latest updates: older ones trained fewer steps, and another policy
MIN_LOG_RATIO = 1e-4  # DDPO's clip range, the smallest in use: a policy that has moved less has not moved far
MAX_SKIPPED = 10  # updates in a row. fp16's loss scale halves with each; after 10 it is a thousandth
FEW = 0.1  # share of the groups: if no more of them have any spread of rewards, there is next to nothing to learn from
# How far a stage's mean reward may lie below the best stage before it, in standard deviations of the rewards: the larger of
# these two. The second depends on the number of groups G, because few groups make a mean uncertain.
MAX_FALL = 1.0
MAX_FALL_SE = 6.0  # divided by sqrt(G)
MAX_TWINS = 0.05  # share of the groups: now and then two siblings may both be blank

Warned = dict[str, str]  # kind: the sign, in two or three words; what: the figures; advice: what to try

ELSEWHERE = "a new experiment with resume_from at the last good stage's checkpoints"
ADVICE = {
    "Gradient norm": f"{ELSEWHERE} and a lower train.learning_rate, or train.max_grad_norm near that median; "
    "train.step_weight=sigma where grad_norm_per_step says that one step makes it",
    "Log-ratio": f"{ELSEWHERE} and a lower train.learning_rate, a smaller clip range, or fewer updates a stage (larger "
    "train.batch_size, fewer train.num_epochs)",
    "Mean reward": f"looking at the stage's images, and {ELSEWHERE} and a lower train.learning_rate, a smaller clip range, "
    "or for nft and awm a larger train.base_weight or train.outside_weight",
    "First log-ratio": "sampling and training on the same device, in the same precision, with the same number of threads",
    "Skipped updates": "a new experiment with mixed_precision=bf16, or no: nothing is learnt from these",
    "Rewards of siblings": "looking at the stage's images: if they are as wanted the run is done; if the model has "
    f"collapsed, {ELSEWHERE} and a lower train.learning_rate; else a reward of finer steps, or more siblings (split_time)",
    "Identical images": f"looking at the stage's images: if they are blank the model has collapsed: {ELSEWHERE} and a "
    "lower train.learning_rate; else longer windows (split_step_left) or more noise (sample.eta)",
    **hacking.ADVICE,
}


def warn(kind: str, what: str) -> Warned:
    """A warning of this kind, with its advice."""
    return {"kind": kind, "what": what, "advice": ADVICE[kind]}


def in_words(warning: Warned) -> str:
    """A warning as a line of the log."""
    return f"{warning['what']}. Try {warning['advice']}."


# ---- updates ----


@dataclass(frozen=True)
class Figure:
    """What a measure reads from an update. If one timestep decides the value, only updates that trained it compare."""

    value: float
    steps: tuple[float, ...] = ()  # the timesteps that the update trained
    decisive: float | None = None  # the timestep that decides the value; None: no single one does


@dataclass
class Measure:
    """Compares one figure of each update with the running median of the updates before it."""

    kind: str  # of the warning
    name: str  # of the figure, in words
    read: Callable[[Mapping[str, Any]], Figure | None]  # None: this update does not count
    latest: deque[Figure]  # of the updates before
    floor: float = 0.0  # no value below it is far off
    num_seen: int = 0
    num_far: int = 0
    worst: tuple[float, float] = (0.0, 0.0)  # (value, median)

    def see(self, update: Mapping[str, Any]) -> None:
        """Count the next update, and whether it is far off."""
        figure = self.read(update)
        if figure is None:
            return
        comparable = [one.value for one in self.latest if figure.decisive is None or figure.decisive in one.steps]
        usual = median(comparable) if len(comparable) >= MIN_UPDATES else 0.0
        self.latest.append(figure)
        self.num_seen += 1
        # A median of 0 says nothing: for instance, all gradients may have been clipped away.
        if usual and figure.value > max(FAR * usual, self.floor):
            self.num_far += 1
            self.worst = max(self.worst, (figure.value, usual))

    def warnings(self) -> list[Warned]:
        """At most one, with the worst update so far."""
        if not self.num_far:
            return []
        value, usual = self.worst
        far = f"{self.num_far} of {self.num_seen} updates are above {FAR:g} times the median of those before"
        return [warn(self.kind, f"{self.name} up to {value:.2g}: {far}, {usual:.2g}")]


def gradient_norm(update: Mapping[str, Any]) -> Figure | None:
    """The norm of an update's gradient; None if the update was skipped."""
    return None if was_skipped(update) else Figure(update["grad_norm"])


def log_ratio(update: Mapping[str, Any]) -> Figure | None:
    """The mean |log-ratio| of the timestep where it is largest, which is also the decisive one; None for a first update.

    It is a mean, because in runs that go well a single transition is now and then far above the median. A stage's first
    update does not count: its policy has not moved yet. With train.timestep_fraction an update may leave the decisive
    timestep out, and then has a much smaller log-ratio.
    """
    if update["first"]:
        return None
    by_step = dict(zip(update["timesteps"], update["log_ratio_per_step"], strict=True))
    decisive = max(by_step, key=by_step.get)
    return Figure(by_step[decisive], tuple(by_step), decisive)


def was_skipped(update: Mapping[str, Any]) -> bool:
    """Whether fp16's loss scaler has skipped the update, because its gradient was not finite."""
    return update["grad_norm"] is None


class UpdateHealth:
    """Watches a stage's updates, given one after the other in the form of metrics/train.jsonl."""

    def __init__(self, earlier: Sequence[Mapping[str, Any]], *, max_first_log_ratio: float):
        """`earlier` are the latest updates of the stages before."""

        def measure(kind: str, name: str, read: Callable, **more: float) -> Measure:
            figures = (read(update) for update in earlier)
            return Measure(kind, name, read, deque((figure for figure in figures if figure), WINDOW), **more)

        self.measures = (
            measure("Gradient norm", "gradient norm", gradient_norm),
            measure("Log-ratio", "mean |log-ratio| of a step", log_ratio, floor=MIN_LOG_RATIO),
        )
        self.max_first_log_ratio = max_first_log_ratio
        self.first: list[Warned] = []
        # Skipped updates in a row: up to now, and at most. A row that began in the stage before goes on.
        self.skipped = len(list(takewhile(was_skipped, reversed(earlier))))
        self.most_skipped = 0  # not of a row that ended in the stage before

    def see(self, update: Mapping[str, Any]) -> list[Warned]:
        """The warnings that this update adds: those of a kind that the stage has not had yet."""
        known = {warning["kind"] for warning in self.warnings()}
        if update["first"] and update["max_abs_log_ratio"] > self.max_first_log_ratio:
            what = f"max |log-ratio| {update['max_abs_log_ratio']:.1e} at the first update, where it should be about 0"
            self.first = [warn("First log-ratio", f"{what}, is beyond {self.max_first_log_ratio:g}")]
        for measure in self.measures:
            measure.see(update)
        self.skipped = self.skipped + 1 if was_skipped(update) else 0
        self.most_skipped = max(self.most_skipped, self.skipped)
        return [warning for warning in self.warnings() if warning["kind"] not in known]

    def warnings(self) -> list[Warned]:
        """The warnings of the stage so far, at most one of each kind."""
        warnings = [*self.first, *(warning for measure in self.measures for warning in measure.warnings())]
        if self.most_skipped >= MAX_SKIPPED:
            what = f"{self.most_skipped} updates in a row were skipped, because fp16 overflowed"
            warnings.append(warn("Skipped updates", what))
        return warnings


# ---- scored stages ----


def stage_warnings(
    earlier: Sequence[Mapping[str, Any]], scored: Mapping[str, Any], apart: Mapping[str, float]
) -> list[Warned]:
    """The warnings about a scored stage. Its figures and those of `earlier` stages are given as in select manifests.

    `apart` are the weights of rewards that are normalised each by itself, by name; {} if `reward` is what is trained on.
    """
    stages = [*earlier, scored]
    # Without `apart` an earlier version's stages have a mean reward, too; they lack all else that a look is made of.
    known = [one for one in stages if {"reward", *apart} <= one.get("figures", {}).keys()]
    known = known if scored in known else []
    units = {name: known[0]["figures"][name][2] or 1.0 for name in apart} if known else {}
    looks = [(one["stage"], stage_look(one["figures"], apart, units)) for one in known]
    rewards = (
        [(index, look["reward"]) for index, look in looks] if apart else [(one["stage"], reward(one)) for one in stages]
    )
    what = "mean of the rewards, each in its own standard deviations," if apart else "mean reward"
    return [
        *fallen_reward(rewards, scored["num_groups"], what),
        *fallen_figures(looks),
        *groups_alike(earlier, scored),
    ]


def stage_look(figures: Mapping[str, Sequence[float]], apart: Mapping[str, float], units: Mapping[str, float]) -> Look:
    """The look that a scored stage is: what it is trained on, and the watched rewards."""
    look = {name: Estimate(*numbers) for name, numbers in figures.items()}
    if apart:
        look["reward"] = hacking.weighed({name: look.pop(name) for name in apart}, apart, units)
    return look


def reward(scored: Mapping[str, Any]) -> Estimate:
    """The mean reward of a stage with its standard deviation, without a standard error."""
    return Estimate(scored["reward_mean"], math.nan, scored["reward_std"])


def fallen_reward(rewards: Sequence[tuple[int, Estimate]], num_groups: int, what: str) -> list[Warned]:
    """A warning if what is trained on is far below the best stage's before. `rewards` are (number of the stage, reward)."""
    if not rewards:
        return []
    *earlier, (_, here) = rewards
    stage, best = max(earlier, key=lambda one: one[1].mean, default=rewards[-1])
    fall, spread = best.mean - here.mean, max(best.deviation, here.deviation)
    if fall <= max(MAX_FALL, MAX_FALL_SE / math.sqrt(num_groups)) * spread:
        return []
    below = f"more than {MAX_FALL:g} standard deviation below that of stage {stage}, {best.mean:.3g}"
    return [warn("Mean reward", f"{what} {here.mean:.3g}, {below}")]


def fallen_figures(looks: Sequence[tuple[int, Look]]) -> list[Warned]:
    """Warnings of watched rewards that have fallen on training images up to the last look, while the reward has risen."""
    warnings = []
    for name, place in hacking.fallen([look for _, look in looks[:-1]], looks[-1][1]) if looks else ():
        (stage, was), (_, here) = looks[place], looks[-1]
        fall = f"watched {name} fell from {was[name].mean:.3g} (stage {stage}) to {here[name].mean:.3g} on training images"
        rise = f"what is trained on rose from {was['reward'].mean:.3g} to {here['reward'].mean:.3g}"
        warnings.append(warn(hacking.HACKED, f"{fall}, while {rise}"))
    return warnings


def groups_alike(earlier: Sequence[Mapping[str, Any]], scored: Mapping[str, Any]) -> list[Warned]:
    """Warnings if the siblings of most groups have the same reward, or those of some groups are identical images."""
    warnings = []
    flat, twins, groups = (scored[key] for key in ("num_flat_groups", "num_twin_groups", "num_groups"))
    # The share of groups that usually have a spread of rewards. It must have been twice the limit: otherwise a reward of 0
    # or 1, whose share goes up and down about any limit, would warn again and again.
    spread = median(1 - one["num_flat_groups"] / one["num_groups"] for one in earlier) if earlier else 0.0
    lost = groups - flat <= FEW * groups and spread >= 2 * FEW
    if flat == groups or lost:
        before = f", usual before: {1 - spread:.0%}" if earlier else ""
        what = f"rewards are the same for all siblings in {flat} of {groups} groups"
        warnings.append(warn("Rewards of siblings", what + before))
    if twins > MAX_TWINS * groups:
        warnings.append(warn("Identical images", f"{twins} of {groups} groups have siblings whose images are identical"))
    return warnings
