"""The page of benchmarks.learning: tables and learning curves, from the figures in its JSON file."""

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.page import STYLE, percent, table

SETS = {"train": "training", "test": "held-out"}
COLOURS = {"train": "#1f6feb", "test": "#c2410c"}


# --- tables ---------------------------------------------------------------------------------------


PAGE = """# Does the preset `{preset}` learn?

By `python -m benchmarks.learning{flag}`, {date}, {machine}.
{source}
± is the standard error over images; that of a gain is paired, because base and tuned model draw the same prompts from the
same noise.

## By seed

{gains}

## What the gain consists of

Images by the first thing that is wrong with them, mean over the seeds. The four shares add up to 100 %, so the changes of
the first three explain the gain.

{failures}

The same step by step: of all images the share that is well formed, of these the share with the right shapes and colours, of
these the share with the right relation. Mean over the seeds.

{conditional}

{best}{sweep}## {deployed_title}

{deployment}
Each figure is of {deployed_images} images.

{deployed}

## Diversity within a prompt

The mean distance between two images of one prompt. The base's figure is over all prompts. The change is over those prompts
for which base and tuned model both have at least two such images.

{diversity}
"""
AT_BEST = """## Against the base at its best

The base's best sampler of those below: {setting}. The tuned models were trained at {trained}.

{rows}

"""
SWEEP = """## Base model over samplers

Accuracy on training prompts, {sweep_images} images each. The best four were judged again, on {sweep_judged_images} images
of other noise. The best of these is *the base's best sampler*.

{rows}

"""
JUDGED = "Each figure is of {num_images} images, on noise that nothing else uses."
NOT_JUDGED = """The figures are those that `run_process.sh` itself has made, each of {num_images} images.
The runs were not judged again on more images and other noise."""
IN_STOCK = "In stock diffusers, with {deployed_by} and {deployed_steps} steps. The LoRA is loaded with `load_lora_weights`."
BY_THE_RUN = """By `run_process.sh` itself, with {deployed_by} and {deployed_steps} steps (`eval.deployed`), on held-out
prompts."""


def write_tables(facts: dict[str, Any], path: Path) -> None:
    """Write the page: one markdown table for each question."""
    makers = (gains, failures, conditional, best, sweep, deployed, diversity)
    words = {
        "flag": "" if facts["preset"] == "shapes" else f" --preset {facts['preset']}",
        "source": (JUDGED if facts["judged"] else NOT_JUDGED).format(**facts),
        "deployed_title": "In stock diffusers" if facts["deployed_in_stock"] else "By the deployed sampler",
        "deployment": (IN_STOCK if facts["deployed_in_stock"] else BY_THE_RUN).format(**facts),
    }
    path.write_text(PAGE.format(**facts | words | {maker.__name__: maker(facts) for maker in makers}))


def points(value: float, error: float | None = None) -> str:
    return f"{100 * value:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def runs(facts: dict[str, Any]) -> list[str]:
    return [f"seed{seed}" for seed in facts["seeds"]]


def last(facts: dict[str, Any], name: str, prompts: str) -> dict[str, Any]:
    return [one for one in facts["curves"][name] if one["prompts"] == prompts][-1]


def title(name: str) -> str:
    return name.replace("seed", "seed ")


def gains(facts: dict[str, Any]) -> str:
    rows = []
    for prompts, words in SETS.items():
        finals = [last(facts, name, prompts) for name in runs(facts)]
        for name in runs(facts):
            one, seconds = last(facts, name, prompts), facts["seconds"][name]
            rows.append([
                words, title(name), percent(one["accuracy"] - one["accuracy_gain"]), percent(one["accuracy"]),
                points(one["accuracy_gain"], one["accuracy_gain_se"]),
                f"{one['reward_gain']:+.4f} ± {one['reward_gain_se']:.4f}",
                str(facts["updates"][name]), f"{seconds / 60:.1f}" if seconds else "interrupted",
            ])  # fmt: skip
        mean, least = facts["mean_gain"][prompts], min(one["accuracy_gain"] for one in finals)
        gain = f"**{points(mean['gain'], mean['se'])}** (over prompts ± {100 * mean['se_by_prompt']:.1f})"
        rows.append([words, "mean of the seeds", "", percent(fmean(one["accuracy"] for one in finals)), gain, "", "", ""])
        rows.append([words, "least of the seeds", "", "", f"**{points(least)}**", "", "", ""])
    return table(["prompts", "run", "accuracy: base", "tuned", "gain, points", "reward gain", "updates", "minutes"], rows)


def failures(facts: dict[str, Any]) -> str:
    words = {"malformed": "malformed", "binding": "shape or colour wrong", "relation": "relation wrong", "right": "right"}
    rows = []
    for prompts in SETS:
        for kind, said in words.items():
            found = [facts["failures"][name][prompts][kind] for name in runs(facts)]
            base, tuned = fmean(one["base"] for one in found), fmean(one["tuned"] for one in found)
            each = ", ".join(points(one["change"], one["se"]) for one in found)
            rows.append([SETS[prompts], said, percent(base), percent(tuned), points(tuned - base), each])
    return table(["prompts", "first failure", "base", "tuned", "change", "by seed"], rows)


def conditional(facts: dict[str, Any]) -> str:
    rows = []
    for prompts, words in SETS.items():
        for which in ("base", "tuned"):
            malformed, binding, relation, _ = (
                fmean(facts["failures"][name][prompts][kind][which] for name in runs(facts))
                for kind in ("malformed", "binding", "relation", "right")
            )
            formed, bound = 1 - malformed, 1 - malformed - binding
            rows.append([words, which, percent(formed), percent(bound / formed), percent((bound - relation) / bound)])
    return table(["prompts", "model", "well formed", "of these bound right", "of these the relation right"], rows)


def best(facts: dict[str, Any]) -> str:
    """The comparison with each tuned model; where they were not judged for it, the base alone; "" without a sweep."""
    if not facts["sweep"]:
        return ""
    compared = facts["best"]
    setting, trained = (
        "{num_steps} steps, guidance {guidance_scale:g}, eta {eta:g}".format(**one)
        for one in (compared["sampler"], facts["sampler"])
    )
    if not facts["judged"]:
        rows = [[words, percent(compared["base"][prompts]["accuracy"])] for prompts, words in SETS.items()]
        return AT_BEST.format(setting=setting, trained=trained, rows=table(["prompts", "base at its best"], rows))
    rows = []
    for prompts, words in SETS.items():
        base = compared["base"][prompts]
        for name in runs(facts):
            one, same = compared[name][prompts]["as_trained"], compared[name][prompts]["at_best"]
            rows.append([
                words, title(name), percent(base["accuracy"]), points(one["accuracy_gain"], one["accuracy_gain_se"]),
                percent(same["accuracy"]), points(same["accuracy_gain"], same["accuracy_gain_se"]),
            ])  # fmt: skip
    header = ["prompts", "run", "base at its best", "gain of the tuned one as trained", "tuned at that sampler", "gain"]
    return AT_BEST.format(setting=setting, trained=trained, rows=table(header, rows))


def sweep(facts: dict[str, Any]) -> str:
    """The base by each sampler; "" if its samplers were not swept."""
    if not facts["sweep"]:
        return ""
    columns = list(dict.fromkeys((one["eta"], one["num_steps"]) for one in facts["sweep"]))
    found = {(one["guidance_scale"], one["eta"], one["num_steps"]): one["accuracy"] for one in facts["sweep"]}
    guidances = sorted({one["guidance_scale"] for one in facts["sweep"]})
    rows = [[f"{guidance:g}"] + [percent(found[guidance, *column]) for column in columns] for guidance in guidances]
    header = ["guidance"] + [f"eta {eta:g}, {steps} steps" for eta, steps in columns]
    return SWEEP.format(**facts, rows=table(header, rows))


def deployed(facts: dict[str, Any]) -> str:
    rows = []
    for guidance, compared in facts["deployed"].items():
        for prompts in compared[runs(facts)[0]]:
            for name in runs(facts):
                one = compared[name][prompts]
                rows.append([
                    guidance, SETS[prompts], title(name), percent(one["accuracy"] - one["gain"]), percent(one["accuracy"]),
                    points(one["gain"], one["gain_se"]),
                ])  # fmt: skip
    return table(["guidance", "prompts", "run", "base", "tuned", "gain"], rows)


MEASURES = {
    "diversity/clip": "scorer's embeddings, cosine distance, all images",
    "diversity/clip_right": "the same, right images",
    "diversity/layout": "layouts, px, all images that show the named things",
    "diversity/layout_right": "the same, right images",
}


def diversity(facts: dict[str, Any]) -> str:
    rows = []
    for prompts, words in SETS.items():
        for key, said in MEASURES.items():
            finals = [last(facts, name, prompts) for name in runs(facts)]
            base = next(one for one in facts["curves"][runs(facts)[0]] if one["prompts"] == prompts)[key]
            each = ", ".join(f"{one[f'{key}_gain']:+.2g} ± {one[f'{key}_gain_se']:.1g}" for one in finals)
            rows.append([words, said, f"{base:.3g}", each])
    return table(["prompts", "measured in", "base", "change, by seed"], rows)


# --- curves ---------------------------------------------------------------------------------------


def draw_curves(facts: dict[str, Any], path: Path) -> None:
    """Four panels over images scored: reward, accuracy, diversity of embeddings and of layouts. Thin lines: seeds."""
    plt.rcParams |= STYLE
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 7.2), constrained_layout=True)
    reward_panel(panels[0, 0], facts)
    accuracy_panel(panels[0, 1], facts)
    for panel, kind, unit in ((panels[1, 0], "clip", "cosine"), (panels[1, 1], "layout", "px")):
        diversity_panel(panel, facts, kind, unit)
    for panel in panels.flat:
        panel.set_xlabel("images scored, thousands")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def series(facts: dict[str, Any], name: str, prompts: str, key: str) -> tuple[list[float], list[float]]:
    chosen = [one for one in facts["curves"][name] if one["prompts"] == prompts]
    return [one["queries"] / 1000 for one in chosen], [one[key] for one in chosen]


def before_stages(facts: dict[str, Any], name: str) -> list[float]:
    """Images scored before each stage, in thousands."""
    num_stages = len(facts["training_reward"][name])
    return [index * last(facts, name, "train")["queries"] / 1000 / num_stages for index in range(num_stages)]


def draw_mean(panel: plt.Axes, curves: list[tuple[list[float], list[float]]], **style: Any) -> None:
    for x, y in curves:
        panel.plot(x, y, lw=0.8, alpha=0.45, color=style["color"], ls=style.get("ls", "-"))
    mean = [fmean(values) for values in zip(*(y for _, y in curves), strict=True)]
    panel.plot(curves[0][0], mean, lw=2.2, **style)


def reward_panel(panel: plt.Axes, facts: dict[str, Any]) -> None:
    """The reward of the images that were trained on, sampled before each stage's updates, and of the evaluations' images."""
    sampled = [(before_stages(facts, name), facts["training_reward"][name]) for name in runs(facts)]
    draw_mean(panel, sampled, color="#3d3d3d", label="images that were trained on")
    for prompts, words in SETS.items():
        draw_mean(
            panel, [series(facts, name, prompts, "reward") for name in runs(facts)], color=COLOURS[prompts], label=words
        )
    panel.set(title="Reward (the scorer's cosine)")
    panel.legend(frameon=False, title="prompts")


def accuracy_panel(panel: plt.Axes, facts: dict[str, Any]) -> None:
    for prompts, words in SETS.items():
        curves = [series(facts, name, prompts, "accuracy") for name in runs(facts)]
        draw_mean(
            panel, [(x, [100 * value for value in y]) for x, y in curves], color=COLOURS[prompts], label=f"{words} prompts"
        )
        if facts["sweep"]:
            best_base = 100 * facts["best"]["base"][prompts]["accuracy"]
            panel.axhline(best_base, color=COLOURS[prompts], ls=":", lw=1.2, label=f"{words}: base at its best sampler")
    panel.set(title="Accuracy (the exact checker, never trained on)", ylabel="images that show the prompt, %")
    panel.legend(framealpha=0.9, edgecolor="none", fontsize=9)


def diversity_panel(panel: plt.Axes, facts: dict[str, Any], kind: str, unit: str) -> None:
    for prompts, words in SETS.items():
        for suffix, style in (("", "-"), ("_right", "--")):
            curves = [series(facts, name, prompts, f"diversity/{kind}{suffix}") for name in runs(facts)]
            which = "right images" if suffix else "all images"
            draw_mean(panel, curves, color=COLOURS[prompts], ls=style, label=f"{words}, {which}")
    panel.set_ylim(bottom=0)
    panel.set(
        title={"clip": "Diversity of image embeddings", "layout": "Diversity of layouts"}[kind],
        ylabel=f"mean pairwise distance, {unit}",
    )
    panel.legend(frameon=False, fontsize=9, ncols=2)
