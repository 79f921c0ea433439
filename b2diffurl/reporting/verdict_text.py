"""The verdict in lines for people: at most some 20, of some 100 characters; only commands and signs may be longer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from b2diffurl.evaluation.choice import Choice
from b2diffurl.evaluation.intervals import MIN_PROMPTS, Interval
from b2diffurl.experiment.evaluation_table import decimals, set_title
from b2diffurl.experiment.stage_table import stage_list
from b2diffurl.reporting.rounded import ends_text, mean_text
from b2diffurl.runtime.logs import printable, shorten

NO_CHANGE = "no significant change"
NAME, COLUMN = 17, 24  # widths of the table
NUM_FIGURES = (7, 2, 2)  # of each table; the file has all
NUM_SIGNS = 2
ABOUT = "Means with their 95 % intervals; base and tuned model draw from the same noise."

Found = Mapping[str, Any]


def in_words(found: Found) -> list[str]:
    """The lines of a verdict."""
    stages = f"{found['stage'] + 1} of {found['num_stages']} stages"
    first = found["tables"][0]
    lines = [
        f"Verdict on {found['experiment']} after {stages}, {found['images']:,} images scored by {found['reward']}.",
        told(found),
        ABOUT,
    ]
    lines.append(f"{'':{NAME}}{'base':{COLUMN}}{first['checkpoint']:{COLUMN}}change")
    for one, most in zip(found["tables"], NUM_FIGURES, strict=False):
        lines += table_lines(one, most)
    lines += few_prompts(found)
    lines += hacking_lines(found)
    if found["warned"]:
        lines.append(f"Warnings in {stage_list(found['warned'])}: see the report.")
    lines += [f"{what}: {path}" for what, path in {**found["files"], **found["next"]}.items()]
    return [printable(line) for line in lines]


def told(found: Found) -> str:
    """The outcome in a sentence."""
    done = [f"{key} {'shows ' if done == NO_CHANGE else 'has '}{done}" for key, done in main_outcomes(found).items()]
    return f"On {found['tables'][0]['title'].lower()}: {'; '.join(done)}."


def few_prompts(found: Found) -> list[str]:
    """A line if a table is of so few prompts that its intervals are for other images of them (evaluation/intervals.py)."""
    few = dict.fromkeys(one["title"] for one in found["tables"] if one["n_prompts"] < MIN_PROMPTS)
    return [f"{' and '.join(few)}: so few that the intervals say nothing about other prompts."] if few else []


def for_page(found: Found) -> dict[str, Any]:
    """The verdict for the report."""
    tables = [
        one | {"cells": [cells(figure) for figure in chosen(one["figures"], most)]}
        for one, most in zip(found["tables"], NUM_FIGURES, strict=False)
    ]
    signs = [printable(line) for line in hacking_lines(found)]
    steps = {what: printable(command) for what, command in found["next"].items()}
    said = " ".join([told(found), ABOUT, *few_prompts(found)])
    return {"told": said, "tables": tables, "signs": signs, "hacked": bool(found["hacking"]), "next": steps}


def main_outcomes(found: Found) -> dict[str, str]:
    """The outcomes of the reward and of the judge's accuracy, or of the first figure if there is neither."""
    outcome = found["outcome"]
    return {key: outcome[key] for key in ("reward", "accuracy") if key in outcome} or dict([next(iter(outcome.items()))])


def table_lines(table: Found, most: int) -> list[str]:
    """A heading, and a line for each figure."""
    number = f"{table['n_images']} images of {table['n_prompts']} prompt{'s' if table['n_prompts'] > 1 else ''}"
    return [f"{table['title']}, {number}, {table['settings']}", *map(figure_line, chosen(table["figures"], most))]


def chosen(figures: Sequence[Found], most: int) -> list[Found]:
    """The figures to show: reward, accuracy, other rewards, and of each diversity that of right images, or else of all."""
    names = [one["key"] for one in figures]
    of_all = [key for key in names if key.startswith("diversity/") and "_" not in key]
    hidden = {key for key in names if key.startswith("diversity/")}
    hidden -= {f"{key}_right" if f"{key}_right" in names else key for key in of_all}
    shown = [one for one in figures if one["key"] not in hidden]
    return sorted(shown, key=lambda one: one["key"] != "reward")[:most]


def figure_line(figure: Found) -> str:
    """A line of the table, `reward  0.180 [0.169, 0.191]  0.281 [0.275, 0.287]  +0.101 [+0.090, +0.112]`."""
    name, base, tuned, changed = cells(figure)
    return f"{shorten(name, NAME - 1):{NAME}}{base:{COLUMN - 1}} {tuned:{COLUMN - 1}} {changed}"


def cells(figure: Found) -> tuple[str, str, str, str]:
    """Name, base, tuned and change of a figure. A change that is not significant is called so, with its interval."""
    scale = 100 if figure["key"] == "accuracy" else 1
    # Two digits of the base's interval, or one of the change's, which is narrower.
    decimals = 1 if scale == 100 else max(decimals_of(figure["base"]), decimals_of(figure["change"]) - 1)
    base, tuned = (shown(figure[name], scale, decimals) for name in ("base", "tuned"))
    changed = shown(figure["change"], scale, decimals, sign="+")
    if not figure["significant"]:
        changed = " ".join(["not significant", *changed.split(" ", 1)[1:]])
    return figure_name(figure), base, tuned, changed


def figure_name(figure: Found) -> str:
    """`reward`, `accuracy, %`, a watched reward's name, `diversity clip`."""
    features = figure["key"].removeprefix("diversity/").partition("_")[0]
    names = {"accuracy": "accuracy, %", "diversity/inception": "Inception Score"}
    return names.get(
        figure["key"], f"diversity {features}" if features != figure["key"].partition("_")[0] else figure["key"]
    )


def decimals_of(found: Found | None) -> int:
    """So many that half of the interval has two digits."""
    if not found:
        return 3
    return decimals(found["mean"], None if found["low"] is None else (found["high"] - found["low"]) / 2)


def shown(found: Found | None, scale: float, decimals: int, *, sign: str = "") -> str:
    """A mean and its interval: `0.180 [0.169, 0.191]`; "" if there is none."""
    if not found:
        return ""
    mean, *ends = (
        "" if found[key] is None else f"{scale * found[key]:{sign}.{decimals}f}" for key in ("mean", "low", "high")
    )
    return f"{mean} [{', '.join(ends)}]" if all(ends) else mean


def hacking_lines(found: Found) -> list[str]:
    """A line for each sign, at most NUM_SIGNS, and where to look; one line if there is none."""
    signs, outcome, before = found["hacking"], found["outcome"], found["hacked_before"]
    more = f" Further signs: {len(signs) - NUM_SIGNS}." if len(signs) > NUM_SIGNS else ""
    lines = [f"WARNING, {one['kind'].lower()}: {one['what']}" for one in signs[:NUM_SIGNS]]
    if signs:
        return [*lines, f"Look at the images; the report says what to try.{more}"]
    earlier = f"; {stage_list(before)} had one, see the report" if before else ""
    fell = [key for key, done in outcome.items() if done == "fallen" and "/" not in key and key != "reward"]
    fell = [key for key in fell if key not in found["parts"]]
    if fell and outcome.get("reward") == "risen":
        have = "has" if len(fell) == 1 else "have"
        less = f"less than a warning takes{earlier}"
        return [f"Perhaps reward hacking: {' and '.join(fell)} {have} fallen, {less}. Look at the images."]
    return [f"No sign of reward hacking{' any more' if before else ''}{earlier}."]


# ---- the best checkpoint ----


def choice_lines(root: Path, choice: Choice) -> list[str]:
    """Which checkpoint was chosen, by which prompts, and how good it is on others."""
    (chosen_set, by), (judged_set, on) = choice.chosen_by, choice.judged_by
    if chosen_set == judged_set:
        of = f"half of the {set_title(chosen_set).lower()} ({by})"
        others = f"the other half ({on})"
    else:
        of, others = f"{set_title(chosen_set).lower()} ({by})", f"{set_title(judged_set).lower()} ({on})"
    over = {"over the base": choice.over_base, "over the last checkpoint": choice.over_last}
    gains = [f"{name} {gain_in_words(choice.figure, gain)}" for name, gain in over.items() if gain]
    lines = [
        f"Best of {choice.num_checkpoints} checkpoints: {choice.best['checkpoint']}, by {choice.figure} on {of}.",
        f"There {in_figures(choice.figure, choice.flattering)}, which flatters: the best of many is best by chance, too.",
        f"On {others} {in_figures(choice.figure, choice.fair)}" + "".join(f"; {gain}" for gain in gains) + ".",
        *([f"LoRA: {root / choice.best['lora']}"] if choice.best["lora"] else []),
    ]
    return [printable(line) for line in lines]


def in_figures(figure: str, found: Interval, *, signed: bool = False) -> str:
    """`93.0 ± 1.2 % [90.5, 95.0]`: mean, standard error and 95 % interval."""
    ends = ends_text(figure, found, signed=signed)
    return mean_text(figure, found, signed=signed) + (f" [{', '.join(ends)}]" if ends else "")


def gain_in_words(figure: str, gain: Interval) -> str:
    """A difference, or that it is no significant one."""
    words = in_figures(figure, gain, signed=True)
    return words if gain.is_significant else f"{NO_CHANGE} ({words})"
