"""The page of benchmarks.study, study.md, and its pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.page import STYLE, percent, table
from benchmarks.study_format import SETS, draw_band, present, shown, spread
from benchmarks.study_noised import ARMS as NOISED
from benchmarks.study_noised import draw_noised, noised_section, seconds_per_evaluation
from benchmarks.study_statistics import (
    Interval,
    Run,
    Runs,
    at_equal_cost,
    at_matched_accuracy,
    by_variant,
    differences,
    final,
    gain,
    interval,
    matched_accuracy,
    pooled_deviation,
    with_cpu_seconds,
)

ARMS = {"ddpo": "plain DDPO", "bpt": "progressive training alone", "bs": "branch sampling alone", "b2": "B²-DiffuRL: both"}
COLOURS = {"ddpo": "#6b6b6b", "bpt": "#1f6feb", "bs": "#2da44e", "b2": "#c2410c"}
FEW = 5  # a comparison of fewer seeds uses a pooled deviation
TOO_FEW = 3  # a comparison of fewer seeds gets no verdict
# (claim, variant, the variant it is compared with, kind of comparison, figure)
CLAIMS = [
    ("**B² beats plain DDPO** after equally many images scored", "b2", "ddpo", "final", "accuracy"),
    ("… and with as many updates, DDPO's batches being larger", "b2", "ddpo, updates of b2", "final", "accuracy"),
    ("… and with as many updates, B² making three passes", "b2, updates of ddpo", "ddpo", "final", "accuracy"),
    ("**Progressive training helps**: S = 6, 7, 8 against S = 8, branches, pairs", "b2", "b2, S = T", "final", "accuracy"),
    ("… the same, independent images, pairs", "bpt", "ddpo, pairs", "final", "accuracy"),
    ("… against S = 6 throughout, branches, pairs", "b2", "bs", "final", "accuracy"),
    ("… growing windows against shrinking ones", "b2", "b2, reversed", "final", "accuracy"),
    ("**A shared prefix helps**: branches against independent siblings, progressive", "b2", "bpt", "final", "accuracy"),
    ("… the same at S = T, where branches share x_T alone", "b2, S = T", "ddpo, pairs", "final", "accuracy"),
    ("**Best and worst alone are better** than all images, independent, S = T", "ddpo, pairs", "ddpo", "final", "accuracy"),
    ("… the same, branches, progressive", "b2", "b2, all images", "final", "accuracy"),
    ("**B² keeps more diversity** than DDPO at the same accuracy: layouts of right images, px", "b2", "ddpo", "matched",
     "diversity/layout_right"),
    ("… embeddings of right images", "b2", "ddpo", "matched", "diversity/clip_right"),
    ("**B² beats the ddpo arm with another objective, too**: DPOK", "b2, dpok", "ddpo arm, dpok", "final",
     "accuracy"),
    ("**It improves on the base**: B² with DDPO's objective", "b2", "base", "gain", "accuracy"),
    ("… B² with DPOK", "b2, dpok", "base", "gain", "accuracy"),
    ("… B² with D3PO", "b2, d3po", "base", "gain", "accuracy"),
    ("… plain DDPO", "ddpo", "base", "gain", "accuracy"),
]  # fmt: skip
POINTER = """ Arms that train on noised images or on a tree have
[a section of their own](#noised-images-and-a-tree)."""
PAGE = """# Do the claims of B²-DiffuRL hold?

By `{command}`: {num_runs} runs of {queries:,} scored images each, one thread a run, several side by side.{quick}
They were made {made}.{pointer}

All runs are in the shapes world ([shapes.md](../shapes.md)), with 8 sampler steps and without guidance, so that a run takes
minutes. K = 5 siblings, CLIP as reward, learning rate {learning_rate:g}, updates of {batch_size} trajectories, {num_epochs}
pass, clip range {eps:g}, step weights {step_weight}, LoRA of rank 16. Where S grows it takes the values 6, 7 and 8 of 8
steps, which correspond to the paper's 14 to 20 of 20. [shapes.md](../shapes.md#how-the-study-was-set-up) says how all this
was chosen. The arms differ in the switches below ([method.md](../method.md#ablations)) and in nothing else.

| arm | siblings | S | what is trained |
| --- | --- | --- | --- |
| ddpo: plain DDPO | independent | 8 of 8 | every image with its advantage |
| bpt: progressive training alone | independent | 6, 7, 8 | best and worst of 5, if beyond ± 0.5 |
| bs: branch sampling alone | branches | 6 | the same |
| b2: B²-DiffuRL | branches | 6, 7, 8 | the same |

Accuracy is by the exact checker, which is used in training by one control only. Each figure is of {num_images} images, on
the same noise in all runs. The base model's accuracy is {base_train} on training prompts and {base_test} on held-out ones.
Runs with the same seed are paired, and each seed is one observation. All intervals are 95 %. Every curve is in
[study.json](study.json).

## The arms

![Arms](study_arms.png)

*Mean of the seeds with its 95 % band.*

{arms}

± is the standard deviation over seeds. Layouts and embeddings are the diversity of right images of held-out prompts at the
end of a run: the mean pairwise distance of layouts in px, and of the scorer's embeddings. The Vendi score is over all
{per_prompt} images of a prompt. Network evaluations are forward passes of one image, in thousands: one for a sampled step,
two for a trained step. Seconds are wall time on a shared machine, and vary by a factor of two for the same work.

## Claim by claim

Differences in accuracy are in points. A claim is *supported* if the whole interval is above 0, *not supported* if it is
below 0, and *undecided* otherwise. Among so many intervals one or two exclude 0 by chance, and comparisons of few seeds
share runs, so rely on the clear ones.

{claims}

## At equal cost

The ddpo arm trains on all images that it samples, the others on the best and worst of five that pass the thresholds, so at
the end of a run the arms have spent different amounts. Here the two runs of a pair are compared where both have spent what
the cheaper one spent in all, interpolated along the curves. Differences are in points of accuracy.

{equal_cost}

## Diversity at matched accuracy

A more accurate model is less diverse. So the two runs of a pair are compared at the best accuracy of the less accurate one,
interpolated along the curves: on average {matched_at}.

![Diversity against accuracy](study_diversity.png)

{matched}

## Other objectives

{objectives}

{noised}## Controls

Each control is the b2 arm or the ddpo arm, with the change that its name says. {pooling}

![Controls](study_controls.png)

{controls}

## Reward hacking

{hacking}
{missing}"""


def write_report(facts: dict[str, Any], against: dict[str, str], out: Path) -> None:
    """Write study.md and its pictures into folder `out`.

    `facts` is the content of study.json; `against` maps each variant to the one that it is compared with.
    """
    runs, out_of = known_runs(facts), comparisons(facts, against)
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams |= STYLE
    pictures = {"arms": draw_arms(runs), "diversity": draw_diversity(runs), "controls": draw_controls(runs, out_of)}
    if noised_section(facts, runs):
        pictures["noised"] = draw_noised(runs)
    for name, figure in pictures.items():
        figure.savefig(out / f"study_{name}.png", dpi=110)
        plt.close(figure)
    (out / "study.md").write_text(page(facts, against))


def known_runs(facts: dict[str, Any]) -> Runs:
    """The runs, with the CPU seconds that the calibration gives them."""
    return by_variant(with_cpu_seconds(facts["runs"], seconds_per_evaluation(facts.get("calibration"))))


def comparisons(facts: dict[str, Any], against: dict[str, str]) -> dict[str, str]:
    """`against` without what is not finished, and without the arms that have a section of their own."""
    done = by_variant(facts["runs"]).keys() - NOISED.keys()
    return {name: other for name, other in against.items() if name in done and other in done and name != other}


def page(facts: dict[str, Any], against: dict[str, str]) -> str:
    """The content of study.md; the arguments are those of `write_report`."""
    runs, against = known_runs(facts), comparisons(facts, against)
    bases = [run["curve"][0] for run in facts["runs"]]
    pairs = {prompts: differences(runs, "b2", "ddpo", matched_accuracy(prompts)) for prompts in SETS}
    objectives, noised = [name for name in runs if "dpok" in name or "d3po" in name], noised_section(facts, runs)
    return PAGE.format(
        **facts["setting"],
        command=facts["command"],
        quick=" **This is a quick run to see that the study works. It is far shorter than the text below says.**"
        if facts["quick"]
        else "",
        made=made(facts["runs"]),
        num_runs=len(facts["runs"]),
        queries=round(max(run["curve"][-1]["queries"] for run in facts["runs"])),
        num_images=facts["num_images"],
        per_prompt=facts["num_images"] // 48,
        base_train=span([base["train"]["accuracy"] for base in bases]),
        base_test=span([base["test"]["accuracy"] for base in bases]),
        arms=arms_table(runs),
        pointer=POINTER if noised else "",
        noised=noised + "\n" if noised else "",
        claims=claims_table(runs, against),
        equal_cost=against_ddpo(runs, list(COSTS.items()), lambda prompts, cost: at_equal_cost(prompts, "accuracy", cost)),
        matched_at=", ".join(
            f"{percent(fmean(values))} of the {SETS[prompts]} prompts for b2 and ddpo"
            for prompts, values in pairs.items()
            if values
        ),
        matched=against_ddpo(runs, list(DIVERSITIES.items()), at_matched_accuracy),
        objectives=variants_table(runs, objectives, against),
        pooling=pooling(runs, against),
        controls=variants_table(runs, [name for name in against if name not in [*ARMS, *objectives]], against),
        hacking=hacking_table(runs),
        missing=missing(facts),
    )


def made(runs: Sequence[Run]) -> str:
    """Where the runs were made, when and by which versions: `2026-11-23 to 2026-11-24 on 2 cores, x86_64 (cpu), torch …`."""
    dates: dict[str, list[str]] = {}
    for run in runs:
        where = f"{run['hardware']} ({run['device']}), torch {run['versions']['torch']}"
        dates.setdefault(where, []).append(run["date"])
    groups = sorted((min(some), max(some), len(some), where) for where, some in dates.items())
    words = [f"{first if first == last else f'{first} to {last}'} on {where}" for first, last, _, where in groups]
    counted = [f"{words[n]} ({groups[n][2]} runs)" for n in range(len(groups))]
    return "; ".join(counted if len(groups) > 1 else words)


def span(shares: Sequence[float]) -> str:
    """The share that all runs have, or the range of their shares: another processor rounds the base model differently."""
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low} to {high}"


# --- tables ---------------------------------------------------------------------------------------


def finals(runs: Runs, name: str, prompts: str, key: str) -> list[float]:
    """Figure `key` at the end of each run of a variant."""
    return [run["curve"][-1][prompts][key] for run in runs[name].values()]


def arms_table(runs: Runs) -> str:
    base = next(iter(next(iter(runs.values())).values()))["curve"][0]
    header = ["arm", "seeds", "training accuracy, %", "held-out accuracy, %", "training reward", "layouts, px", "embeddings",
              "Vendi score", "updates", "network evaluations", "seconds"]  # fmt: skip
    rows = [[
        "base", "", f"{100 * base['train']['accuracy']:.1f}", f"{100 * base['test']['accuracy']:.1f}",
        f"{base['train']['reward']:.4f}", f"{base['test']['diversity/layout_right']:.1f}",
        f"{base['test']['diversity/clip_right']:.4f}", f"{base['test']['diversity/clip_vendi']:.2f}", "", "", "",
    ]]  # fmt: skip
    for arm in present(runs, ARMS):
        last = [run["curve"][-1] for run in runs[arm].values()]
        rows.append([
            f"{arm}: {ARMS[arm]}", str(len(last)),
            *(spread(finals(runs, arm, prompts, "accuracy"), scale=100) for prompts in SETS),
            spread(finals(runs, arm, "train", "reward"), "{:.4f}"),
            spread(finals(runs, arm, "test", "diversity/layout_right")),
            spread(finals(runs, arm, "test", "diversity/clip_right"), "{:.4f}"),
            spread(finals(runs, arm, "test", "diversity/clip_vendi"), "{:.2f}"),
            f"{fmean(one['updates'] for one in last):.0f}", f"{fmean(one['evaluations'] for one in last) / 1000:.0f}",
            f"{fmean(one['seconds'] for one in last):.0f}",
        ])  # fmt: skip
    return table(header, rows)


def claims_table(runs: Runs, against: dict[str, str]) -> str:
    rows = []
    for claim, one, other, kind, key in CLAIMS:
        for prompts, words in SETS.items():
            if found := compare(runs, against, one, other, kind, prompts, key):
                names = f"{one} − {other}"
                verdict = found.verdict if found.num_seeds >= TOO_FEW else "undecided: too few seeds"
                rows.append([claim, words, names, str(found.num_seeds), shown(found, key), f"**{verdict}**"])
    return table(["claim", "prompts", "compared", "seeds", "difference [95 %]", "verdict"], rows)


def compare(runs: Runs, against: dict[str, str], one: str, other: str, kind: str, prompts: str, key: str) -> Interval | None:
    """The difference between variants `one` and `other`, with its interval; None if there are no such runs."""
    measures = {"final": final, "matched": at_matched_accuracy, "gain": gain}
    values = differences(runs, one, one if kind == "gain" else other, measures[kind](prompts, key))
    # With few seeds use the deviation of all comparisons with the same arm. Find which arm that is from either side.
    member = other if against.get(other) == one else one
    own = len(values) >= FEW or kind != "final"
    return interval(values, pooled=None if own else pooled(runs, against, member, prompts, key))


COSTS = {
    "queries": "images scored",
    "evaluations": "network evaluations",
    "updates": "updates",
    "seconds": "seconds",
}
DIVERSITIES = {
    "diversity/layout_right": "layouts of right images, px",
    "diversity/clip_right": "embeddings of right images",
    "diversity/clip": "embeddings of all images",
    "diversity/clip_vendi": "Vendi score of all images",
}


def against_ddpo(runs: Runs, rows: list[tuple[str, str]], measure: Callable[[str, str], Callable[[Run, Run], float]]) -> str:
    """A table of the differences between the other arms and ddpo: a row for each (key, words) of `rows` and prompt set.

    The difference is measure(prompts, key).
    """
    arms = [arm for arm in present(runs, ARMS) if arm != "ddpo"]
    cells = []
    for key, words in rows:
        form = key if key in DIVERSITIES else "accuracy"
        for prompts, said in SETS.items():
            found = [interval(differences(runs, arm, "ddpo", measure(prompts, key))) for arm in arms]
            cells.append([words, said, *(shown(one, form) for one in found)])
    return table(["", "prompts", *(f"{arm} − ddpo" for arm in arms)], cells)


def variants_table(runs: Runs, names: Sequence[str], against: dict[str, str]) -> str:
    header = ["variant", "seeds", "updates", "training accuracy, %", "held-out accuracy, %", "against", "training, points",
              "held-out, points", "layouts of right images, held-out, px"]  # fmt: skip
    rows = []
    for name in names:
        updates = fmean(run["curve"][-1]["updates"] for run in runs[name].values())
        cells = [name, str(len(runs[name])), f"{updates:.0f}"]
        cells += [spread(finals(runs, name, prompts, "accuracy"), scale=100) for prompts in SETS]
        cells.append(against.get(name, ""))
        for prompts, key in (("train", "accuracy"), ("test", "accuracy"), ("test", "diversity/layout_right")):
            found = compare(runs, against, name, against[name], "final", prompts, key) if name in against else None
            cells.append(shown(found, key))
        rows.append(cells)
    return table(header, rows) if rows else "None was run."


def hacking_table(runs: Runs) -> str:
    """A table of gains in reward and in accuracy: of the arms, and of the runs whose reward was the checker."""
    rows = []
    for name in present(runs, [*ARMS, "b2, rewarded by the checker"]):
        for prompts, said in SETS.items():
            cells = [name, said, str(len(runs[name]))]
            for key, form, scale in (("reward", "{:+.4f}", 1), ("accuracy", "{:+.1f}", 100)):
                cells.append(spread(differences(runs, name, name, gain(prompts, key)), form, scale))
            rows.append(cells)
    text = table(
        ["trained", "prompts", "seeds", "gain in the scorer's reward", "gain in the checker's accuracy, points"], rows
    )
    return (
        "A reward is hacked if it rises while the accuracy by the checker does not. Gains are over the base, ± standard "
        f"deviation over seeds. In the last rows the checker is the reward, and the scorer is only watched.\n\n{text}"
    )


def missing(facts: dict[str, Any]) -> str:
    """Sentences on the runs that failed and on those that are not made yet; "" if there are none."""
    failed = "".join(f"\nFailed: {name} ({reason}).\n" for name, reason in facts["failed"].items())
    seeds: dict[str, list[str]] = {}
    for name, seed in facts["missing"]:
        seeds.setdefault(name, []).append(str(seed))
    todo = "; ".join(f"{name} (seed {', '.join(some)})" for name, some in seeds.items())
    return failed + (f"\nNot run yet: {todo}. The same command goes on with them.\n" if todo else "")


# --- what is compared -----------------------------------------------------------------------------


def pooled(runs: Runs, against: dict[str, str], one: str, prompts: str, key: str) -> tuple[float, int] | None:
    """The pooled deviation of a figure's paired differences, over all variants compared with the same arm as `one`."""
    alike = [name for name, other in against.items() if other == against.get(one, "ddpo")]
    return pooled_deviation([differences(runs, name, against[name], final(prompts, key)) for name in alike])


def pooling(runs: Runs, against: dict[str, str]) -> str:
    """Sentences on the deviation that is used where there are few seeds."""
    words = []
    for arm, member in (("b2", "b2, S = T"), ("ddpo", "b2")):
        if found := pooled(runs, against, member, "test", "accuracy"):
            words.append(f"{100 * found[0]:.1f} points of held-out accuracy against {arm} ({found[1]} degrees of freedom)")
    return (
        f"With fewer than {FEW} seeds the interval uses the deviation pooled over all differences to the same arm: "
        f"{' and '.join(words)}. This assumes that all variants vary alike. In fact variants that learn more vary more, so "
        "their intervals are somewhat too narrow, and the other intervals too wide."
    )


# --- pictures -------------------------------------------------------------------------------------


def draw_arms(runs: Runs) -> plt.Figure:
    """Six panels: accuracies, reward and diversity over images scored, and held-out accuracy over two other costs."""
    figure, panels = plt.subplots(2, 3, figsize=(14, 7.4), constrained_layout=True)
    held_out, costs = "Accuracy on held-out prompts, %", {"queries": "images scored", "evaluations": "network evaluations"}
    for panel, prompts, key, scale, heading, cost in (
        (panels[0, 0], "train", "accuracy", 100, "Accuracy on training prompts, %", "queries"),
        (panels[0, 1], "test", "accuracy", 100, held_out, "queries"),
        (panels[0, 2], "train", "reward", 1, "Reward on training prompts (the scorer)", "queries"),
        (panels[1, 0], "test", "accuracy", 100, held_out, "evaluations"),
        (panels[1, 1], "test", "accuracy", 100, held_out, "updates"),
        (panels[1, 2], "test", "diversity/layout_right", 1, "Layouts of right held-out images, px", "queries"),
    ):
        for arm in present(runs, ARMS):
            some = list(runs[arm].values())
            curves = np.array([[scale * point[prompts][key] for point in run["curve"]] for run in some])
            spent = np.array([[point[cost] for point in run["curve"]] for run in some]).mean(0)
            draw_band(panel, spent if cost == "updates" else spent / 1000, curves, COLOURS[arm], f"{arm}: {ARMS[arm]}")
        panel.set(title=heading, xlabel=f"{costs[cost]}, thousands" if cost in costs else cost)
    panels[0, 0].legend(frameon=False, fontsize=9)
    return figure


def draw_diversity(runs: Runs) -> plt.Figure:
    """Four panels: diversity of right images against accuracy, along each run (thin) and on average (thick)."""
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 7.2), constrained_layout=True)
    for row, (prompts, words) in zip(panels, SETS.items(), strict=True):
        for panel, key, unit in (
            (row[0], "diversity/layout_right", "layouts, px"),
            (row[1], "diversity/clip_right", "embeddings, cosine distance"),
        ):
            for arm in present(runs, ARMS):
                points = np.array([
                    [(100 * point[prompts]["accuracy"], point[prompts][key]) for point in run["curve"]]
                    for run in runs[arm].values()
                ])  # fmt: skip
                for run in points:
                    panel.plot(run[:, 0], run[:, 1], color=COLOURS[arm], lw=0.8, alpha=0.35)
                mean = points.mean(0)
                panel.plot(mean[:, 0], mean[:, 1], color=COLOURS[arm], lw=2.2, marker="o", ms=3.5, label=arm)
            panel.set(title=f"Right images, {words} prompts", xlabel="accuracy, %", ylabel=unit)
    panels[0, 0].legend(frameon=False, title="thick: mean of the seeds", fontsize=9)
    return figure


def draw_controls(runs: Runs, against: dict[str, str]) -> plt.Figure:
    """Paired differences in final accuracy with their intervals, a row for each comparison."""
    figure, panel = plt.subplots(figsize=(9.5, 1.5 + 0.34 * len(against)), constrained_layout=True)
    legend = {}  # prompt set -> one of its marks
    for row, (name, other) in enumerate(reversed(against.items())):
        for (prompts, words), offset, colour in zip(SETS.items(), (0.14, -0.14), ("#1f6feb", "#c2410c"), strict=True):
            found = compare(runs, against, name, other, "final", prompts, "accuracy")
            if not found:
                continue
            bar = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
            mark = panel.errorbar(100 * found.mean, row + offset, xerr=bar, fmt="o", ms=4, color=colour, capsize=2, lw=1.4)
            legend[f"{words} prompts"] = mark
    panel.axvline(0, color="#3d3d3d", lw=1)
    panel.set_yticks(range(len(against)), [f"{name} − {other}" for name, other in reversed(against.items())])
    panel.grid(axis="y", visible=False)
    panel.set(
        xlabel="difference in final accuracy, points [95 %]", title="Paired differences after equally many images scored"
    )
    if legend:
        panel.legend(legend.values(), legend.keys(), frameon=False, fontsize=9, loc="best")
    return figure
