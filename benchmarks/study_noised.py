"""The section of the study's page on objectives that train on noised images and on a tree, and its picture."""

from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from b2diffurl.configuration.keys import flatten
from benchmarks.page import percent, table
from benchmarks.study_format import SETS, draw_band, present, shown, spread
from benchmarks.study_statistics import (
    Interval,
    Run,
    Runs,
    at_equal_cost,
    at_matched_accuracy,
    by_variant,
    cost_to_reach,
    differences,
    final,
    gain,
    interval,
    mean_curve,
    with_cost,
)

BEST = "b2, best"
ARMS = {
    BEST: "B² with nft: branches, contrast pairs, windows that begin at the noise: the first 4, 5 and 6 steps",
    "b2, nft": "the same with windows that grow towards the noise: steps 3 to 5, 2 to 5, 1 to 5",
    "b2, nft, all images": "… trained on all images",
    "b2, nft, independent images": "… with siblings that share a prompt but no prefix",
    "ddpo arm, nft": "independent images, all noise levels, trained on all images",
    "b2, awm": "B² with awm",
    "ddpo, tree": "DDPO's objective on branches that part three times, trained on all images",
}
REFERENCES = {"ddpo": "plain DDPO", "b2": "B² with DDPO's objective"}
COSTS = {"queries": "images scored", "evaluations": "network evaluations", "cpu_seconds": "CPU seconds"}
UNITS = {"queries": 1, "evaluations": 1000, "cpu_seconds": 1}  # evaluations are shown in thousands
COLOURS = {"ddpo": "#6b6b6b", "b2": "#c2410c", BEST: "#1f6feb", "ddpo arm, nft": "#2da44e"}
MARGIN = 0.02  # by which well-formed images may fall below the base's
SHARES = {"queries": (1 / 2, "half"), "evaluations": (1 / 3, "a third")}  # of DDPO's cost, for which BEST should come as far
QUESTIONS = [
    ("Do branches help? Against independent siblings", "b2, nft", "b2, nft, independent images"),
    ("Do contrast pairs help? Against all images", "b2, nft", "b2, nft, all images"),
    ("Which windows? Those that begin at the noise, against growing towards it", BEST, "b2, nft"),
    ("Which objective? nft against awm", "b2, nft", "b2, awm"),
    ("Does B² help with nft? Against the ddpo arm", "b2, nft", "ddpo arm, nft"),
    ("… with the settings found in tuning", BEST, "ddpo arm, nft"),
]
SECTION = """## Noised images and a tree

The objectives `nft` and `awm` ([method.md](../method.md#objectives)) need no trajectories and no likelihoods. They add noise
to a finished image again, and pull the network's prediction towards good images and away from bad ones. In a tree branches
part several times. `{best}` was chosen, and all settings were fixed, before these runs
([shapes.md](../shapes.md#how-the-study-was-set-up)).

![Accuracy by cost](study_noised.png)

*Mean of the seeds with its 95 % band. Dashed: what plain DDPO has in the end.*

{arms}

± is the standard deviation over seeds. Network evaluations are in thousands. A trained noised image is two of them, as a
trained step is, and one more for each other network that the objective compares with: the one that sampled, the base.

### Targets

They were set before the runs, for `{best}` on held-out prompts.

{targets}

### At equal cost

Differences to plain DDPO in points of accuracy, paired by seed, with 95 % intervals. At equal images both runs are at their
end. Otherwise they are compared where both have spent what the cheaper one spent in all, interpolated along the curves.

{equal_cost}

### The cost of {level} on held-out prompts

That is what plain DDPO has in the end, on average. The arms' mean curves come to it at these costs, interpolated between
judged stages; in brackets the share of what plain DDPO spent in all.

{reach}

### What matters

Differences in points of accuracy on held-out prompts.

{questions}

### Well-formed images and diversity

Well-formed: of the images of held-out prompts, whatever they show. *At the end* is against the base, the other columns are
against plain DDPO at the best accuracy of the less accurate run, interpolated along the curves. Layouts and embeddings are
the diversity of right images.

{quality}

### By seed

Accuracy on training / held-out prompts, %:

{accuracies}

Images scored / thousand network evaluations / CPU seconds until {level} of held-out prompts are right; –: the run never came
to it, or its CPU seconds are not known:

{costs}

### CPU seconds

CPU seconds are the process time of one thread: sampling, scoring and training with loading, without judging. {calibration}

### Settings

What each arm changes of the preset `b2`:

{settings}
"""
NOT_CALIBRATED = """They were measured in the runs themselves, which were made side by side. Runs that are older than this
measurement have none."""
CALIBRATED = """For {arms}
they are computed: an arm's network evaluations, times the seconds of one. So runs with equal settings and equally many
evaluations have equal seconds, whichever machine they were made on. The seconds are medians of three runs of two stages,
made one after the other, in turn ({date}, {hardware}, torch {torch}). The other arms' seconds were measured in their runs.
These were made side by side, which slows them down, so these seconds may be somewhat high.

{table}"""


def noised_section(facts: dict[str, Any], runs: Runs) -> str:
    """The section in markdown; "" if none of its arms has a finished run, or there is no plain DDPO to compare them with.

    `facts` is the content of study.json, `runs` its runs with all CPU seconds that are known.
    """
    if not present(runs, ARMS) or "ddpo" not in runs:
        return ""
    level = level_of(runs)
    return SECTION.format(
        best=BEST,
        level=percent(level),
        arms=arms_table(runs),
        targets=targets_table(runs),
        equal_cost=equal_cost_table(runs),
        reach=reach_table(runs, level),
        questions=questions_table(runs),
        quality=quality_table(runs),
        accuracies=by_seed(
            runs, lambda run: " / ".join(f"{100 * run['curve'][-1][prompts]['accuracy']:.1f}" for prompts in SETS)
        ),
        costs=by_seed(runs, lambda run: " / ".join(cost_words(run, level, cost) for cost in COSTS)),
        settings=settings_table(runs),
        calibration=calibration_words(facts.get("calibration"), by_variant(facts["runs"])),
    )


def seconds_per_evaluation(calibration: dict[str, Any] | None) -> dict[str, float]:
    """The CPU seconds of an evaluation by arm, from the medians of a calibration."""
    arms = calibration["arms"] if calibration else {}
    return {name: median(arm["cpu_seconds"]) / arm["evaluations"] for name, arm in arms.items()}


def level_of(runs: Runs) -> float:
    """The held-out accuracy that plain DDPO has in the end, mean of the seeds."""
    return fmean(run["curve"][-1]["test"]["accuracy"] for run in runs["ddpo"].values())


def listed(runs: Runs) -> list[str]:
    """The arms of the section's tables: plain DDPO and b2, then those on noised images."""
    return present(runs, [*REFERENCES, *ARMS])


def at_equal(cost: str, prompts: str, key: str) -> Callable[[Run, Run], float]:
    """A measure: the difference at equal cost. At equal images that is at the runs' ends, without interpolation."""
    return final(prompts, key) if cost == "queries" else at_equal_cost(prompts, key, cost)


def difference(runs: Runs, one: str, other: str, cost: str, prompts: str = "test") -> Interval | None:
    """The difference in accuracy at equal cost, with its interval; None if too few seeds have both runs with this cost."""
    return interval(differences(with_cost(runs, cost), one, other, at_equal(cost, prompts, "accuracy")))


def matched(runs: Runs, one: str, prompts: str, key: str) -> Interval | None:
    """The difference to plain DDPO at matched accuracy, with its interval."""
    return interval(differences(runs, one, "ddpo", at_matched_accuracy(prompts, key)))


# --- tables ---------------------------------------------------------------------------------------


def arms_table(runs: Runs) -> str:
    header = ["arm", "what it is", "seeds", "training accuracy, %", "held-out accuracy, %", "images scored", "updates",
              "network evaluations", "CPU seconds"]  # fmt: skip
    rows = []
    for name in listed(runs):
        last = [run["curve"][-1] for run in runs[name].values()]
        cells = [name, (REFERENCES | ARMS)[name], str(len(last))]
        cells += [spread([one[prompts]["accuracy"] for one in last], scale=100) for prompts in SETS]
        cells += [f"{fmean(one['queries'] for one in last):,.0f}", f"{fmean(one['updates'] for one in last):.0f}"]
        cells.append(f"{fmean(one['evaluations'] for one in last) / 1000:.0f}")
        timed = [run["curve"][-1]["cpu_seconds"] for run in with_cost(runs, "cpu_seconds").get(name, {}).values()]
        rows.append([*cells, f"{fmean(timed):.0f}" if timed else ""])
    return table(header, rows)


def targets_table(runs: Runs) -> str:
    """What the best arm should do, what it does, and whether that is enough."""
    rows = [equal_cost_target(runs, cost) for cost in COSTS]
    rows += [reach_target(runs, cost) for cost in SHARES]
    falls = interval(differences(runs, BEST, BEST, gain("test", "shapes/well_formed")))
    words = f"well-formed images, against the base's, in points: the mean not below -{100 * MARGIN:.0f}"
    rows.append((words, shown(falls, "accuracy"), falls and falls.mean >= -MARGIN))
    for key, what in (("diversity/layout_right", "layouts, px"), ("diversity/clip_right", "embeddings")):
        found = matched(runs, BEST, "test", key)
        words = (
            f"diversity of right images, against plain DDPO's at the same accuracy, {what}: not the whole interval below 0"
        )
        rows.append((words, shown(found, key), found and found.high >= 0))
    verdicts = {None: "not measured", True: "**yes**", False: "**no**"}
    return table(["target", "measured [95 %]", "met"], [[words, measured, verdicts[met]] for words, measured, met in rows])


Target = tuple[str, str, bool | None]  # in words, measured, met


def equal_cost_target(runs: Runs, cost: str) -> Target:
    found = difference(runs, BEST, "ddpo", cost)
    words = f"above plain DDPO at equal {COSTS[cost]}, in points: the whole interval above 0"
    return words, shown(found, "accuracy"), found and found.low > 0


def reach_target(runs: Runs, cost: str) -> Target:
    level, (limit, share) = level_of(runs), SHARES[cost]
    words = f"{percent(level)} right, as plain DDPO in the end, for at most {share} of its {COSTS[cost]}"
    if BEST not in runs:
        return words, "", None
    spent, whole = reached(runs, BEST, level, cost), whole_cost(runs, cost)
    if spent is None:
        return words, "never came to it", False
    return words, f"{percent(spent / whole)}: {amount(spent, cost)}", spent <= limit * whole


def equal_cost_table(runs: Runs) -> str:
    rows = []
    for name in [name for name in listed(runs) if name != "ddpo"]:
        for prompts, said in SETS.items():
            found = [difference(runs, name, "ddpo", cost, prompts) for cost in COSTS]
            rows.append([f"{name} − ddpo", said, *(shown(one, "accuracy") for one in found)])
    return table(["compared", "prompts", *(f"equal {words}" for words in COSTS.values())], rows)


def reach_table(runs: Runs, level: float) -> str:
    rows = []
    for name in listed(runs):
        cells = []
        for cost in COSTS:
            spent, whole = reached(runs, name, level, cost), whole_cost(runs, cost)
            share = f" ({100 * spent / whole:.0f} %)" if spent is not None and whole else ""
            cells.append("–" if spent is None else amount(spent, cost) + share)
        some = runs[name].values()
        there = [run for run in some if cost_to_reach(run, "test", level, "queries") is not None]
        rows.append([name, *cells, f"{len(there)} of {len(some)}"])
    return table(["arm", *(f"{words}" for words in COSTS.values()), "seeds that come to it"], rows)


def questions_table(runs: Runs) -> str:
    rows = []
    for question, one, other in QUESTIONS:
        if difference(runs, one, other, "queries"):
            found = [shown(difference(runs, one, other, cost), "accuracy") for cost in COSTS]
            rows.append([question, f"{one} − {other}", *found])
    return table(["", "compared", *(f"equal {words}" for words in COSTS.values())], rows) if rows else "Not measured yet."


def quality_table(runs: Runs) -> str:
    key = "shapes/well_formed"
    rows = []
    for name in listed(runs):
        share = spread([run["curve"][-1]["test"][key] for run in runs[name].values()], scale=100)
        change = interval(differences(runs, name, name, gain("test", key)))
        cells = [name, share, shown(change, "accuracy")]
        if name != "ddpo":
            cells.append(shown(matched(runs, name, "test", key), "accuracy"))
            cells += [
                shown(matched(runs, name, "test", one), one) for one in ("diversity/layout_right", "diversity/clip_right")
            ]
        rows.append(cells + [""] * (6 - len(cells)))
    header = ["arm", "well-formed, %", "at the end, points", "at the same accuracy, points", "layouts, px", "embeddings"]
    return table(header, rows)


def by_seed(runs: Runs, words: Callable[[Run], str]) -> str:
    """A table with a row for each arm and a column for each seed."""
    seeds = sorted({seed for name in listed(runs) for seed in runs[name]})
    rows = [[name, *(words(runs[name][seed]) if seed in runs[name] else "" for seed in seeds)] for name in listed(runs)]
    return table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def settings_table(runs: Runs) -> str:
    rows = []
    for name in listed(runs):
        settings = flatten(next(iter(runs[name].values()))["settings"])
        rows.append([name, ", ".join(f"`{key}={value}`" for key, value in settings.items())])
    return table(["arm", "settings"], rows)


# --- costs in words -------------------------------------------------------------------------------


def reached(runs: Runs, name: str, level: float, cost: str) -> float | None:
    """What the arm's mean curve costs until it comes to `level`; None if it never does, or the cost is not known."""
    curve = mean_curve(list(runs[name].values()))
    return cost_to_reach(curve, "test", level, cost) if cost in curve["curve"][-1] else None


def whole_cost(runs: Runs, cost: str) -> float | None:
    """What plain DDPO has spent in the end, mean of the seeds; None if it is not known."""
    return mean_curve(list(runs["ddpo"].values()))["curve"][-1].get(cost)


def cost_words(run: Run, level: float, cost: str) -> str:
    spent = cost_to_reach(run, "test", level, cost) if cost in run["curve"][-1] else None
    return "–" if spent is None else f"{spent / UNITS[cost]:,.0f}"


def amount(spent: float, cost: str) -> str:
    """A cost with its unit: `1,920`, `46 thousand`, `110 s`."""
    return f"{spent / UNITS[cost]:,.0f}" + {"evaluations": " thousand", "cpu_seconds": " s"}.get(cost, "")


def calibration_words(calibration: dict[str, Any] | None, measured: Runs) -> str:
    """How the CPU seconds were found, and a table of the calibration. `measured` are the runs as they were made."""
    if not calibration:
        return NOT_CALIBRATED
    rows = []
    for name, arm in calibration["arms"].items():
        seconds, each = median(arm["cpu_seconds"]), seconds_per_evaluation(calibration)[name]
        last = [run["curve"][-1] for run in with_cost(measured, "cpu_seconds").get(name, {}).values()]
        ratio = fmean(point["cpu_seconds"] / (each * point["evaluations"]) for point in last) if last else None
        rows.append([
            name, " ".join(f"{one:.1f}" for one in arm["cpu_seconds"]), f"{1000 * seconds / arm['queries']:.1f}",
            f"{1000 * each:.2f}", f"{ratio:.2f}" if ratio else "",
        ])  # fmt: skip
    header = ["arm", "CPU seconds of two stages", "ms an image", "ms an evaluation", "its runs, measured / computed"]
    return CALIBRATED.format(
        arms=", ".join(f"`{name}`" for name in calibration["arms"]),
        date=calibration["date"],
        hardware=calibration["hardware"],
        torch=calibration["versions"]["torch"],
        table=table(header, rows),
    )


# --- picture --------------------------------------------------------------------------------------


def draw_noised(runs: Runs) -> plt.Figure:
    """Three panels: held-out accuracy over images, network evaluations and CPU seconds."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True, sharey=True)
    for panel, (cost, words) in zip(panels, COSTS.items(), strict=True):
        known = with_cost(runs, cost)
        for name in present(known, COLOURS):
            some = list(known[name].values())
            curves = np.array([[100 * point["test"]["accuracy"] for point in run["curve"]] for run in some])
            spent = np.array([[point[cost] / UNITS[cost] for point in run["curve"]] for run in some]).mean(0)
            draw_band(panel, spent, curves, COLOURS[name], f"{name}: {(REFERENCES | ARMS)[name]}")
        panel.axhline(100 * level_of(runs), color=COLOURS["ddpo"], lw=1, ls="--", zorder=0)
        panel.set(xlabel=words + (", thousands" if UNITS[cost] == 1000 else ""))
    panels[0].set(ylabel="Accuracy on held-out prompts, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
