"""The verdict on a run: what its newest judged stage has changed, in some 20 lines for people, and as verdict.json.

It is made from the experiment's files alone; the same files give the same verdict.
"""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from b2diffurl.configuration.commands import judging_command
from b2diffurl.configuration.settings import describe_reward, reward_weights
from b2diffurl.evaluation.hacking import ADVICE, curves, evaluation_warnings
from b2diffurl.evaluation.intervals import NORMAL, Interval, change, interval
from b2diffurl.experiment.evaluation_table import describe_sampler, evaluation_rows, set_title
from b2diffurl.experiment.folder import EXPERIMENTS
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.stage_table import Row, image_rows, stage_warnings, warned_rows
from b2diffurl.reporting.plots import describe_figure, figures_of
from b2diffurl.reporting.verdict_text import NO_CHANGE, in_words, main_outcomes
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import log_of, logger
from b2diffurl.runtime.paths import command

FILE = "verdict.json"


def refresh(root: Path) -> dict[str, Any] | None:
    """The verdict, which is also written to verdict.json. An error is logged and not raised: it must not stop a run."""
    try:
        if found := verdict(root):
            files.write_json(root / FILE, found)
        return found
    except Exception as error:
        logger.debug("verdict failed", exc_info=True)
        logger.warning("verdict: %s: %s; run_eval.py tries again", type(error).__name__, error)
    return None


def verdict(root: Path, stages: Sequence[Row] | None = None, rows: Sequence[Row] | None = None) -> dict[str, Any] | None:
    """The verdict on the experiment in folder `root`; None while base model and a stage have not been judged alike.

    `stages` and `rows` are its rows with `queries` and its evaluation_rows, if they have been read.

    experiment, preset, reward, judge   what it is
    stage, num_stages, images           the newest judged stage, how many are wanted, images scored until then
    outcome                             {figure: risen | fallen | no significant change} on held-out prompts
    tables                              of each prompt set and sampler, held-out prompts first: see `table`
    hacking, hacked_before              signs of reward hacking of that stage; the stages before whose evaluations had some
    parts, warned                       the rewards of a mixture; the stages with any warning of training
    files, next                         {what: path} of what was made, {what: command} of what can be done now
    text                                all this in lines for people
    """
    stages = image_rows(root) if stages is None else stages
    rows = evaluation_rows(root, stages) if rows is None else rows
    judged = [row["stage"] for row in rows if row["stage"] is not None]
    if not judged:
        return None
    record, newest = files.read_json(root / "config.json"), max(judged)
    config = record["config"]
    tables = [found for base, tuned in judged_pairs(rows, newest) if (found := table(root, base, tuned))]
    if not tables:
        return None
    signs = signs_of_evaluations(root, rows)
    found = {
        "experiment": root.name,
        "preset": config.get("preset", ""),
        "reward": describe_reward(config["reward"]),
        "judge": config["eval"].get("judge", ""),
        "stage": newest,
        "num_stages": max(config["stage_cnt"], newest + 1),  # a run may go on for longer than it was begun for
        "images": next(row["queries"] for row in stages if row["stage"] == newest),
        "outcome": {one["key"]: outcome(one) for one in tables[0]["figures"]},
        "tables": tables,
        "hacking": hacking_signs(root, signs, newest),
        "hacked_before": sorted({row["stage"] for row in signs if row["stage"] < newest}),
        "parts": sorted(config["reward"].get("weights") or ()),
        "warned": sorted({row["stage"] for row in warned_rows(root)}),
    }
    found |= {"files": made_files(root, record, tables[0]["lora"]), "next": what_next(root, record, found)}
    return found | {"text": in_words(found)}


def judged_pairs(rows: Sequence[Row], stage: int) -> list[tuple[Row, Row]]:
    """(row of the base, row of the stage) for each prompt set and sampler that has both."""
    pairs = []
    for curve in curves(rows):
        base = [row for row in curve if row["checkpoint"] == "base"]
        tuned = [row for row in curve if row["stage"] == stage]
        pairs += [(base[0], tuned[0])] if base and tuned else []
    return sorted(pairs, key=lambda pair: in_order(pair[1]))


def in_order(row: Row) -> tuple[int, bool]:
    """Held-out prompts come first, then training prompts, then files; training's sampler before the deployed one."""
    return {"test": 0, "train": 1}.get(row["prompts"], 2), row["sampler"] != "training"


def table(root: Path, base: Row, tuned: Row) -> dict[str, Any] | None:
    """The figures of the base and of a stage on one prompt set with one sampler; None if they have none in common.

    Each has `base`, `tuned` and `change`, a mean with both ends of its 95 % interval (evaluation/intervals.py); the change
    is of the same images on the same noise. Diversities are paired by prompt.
    """
    results = [read_result(root, row) for row in (base, tuned)]
    figures = []
    for key in figures_of([base, tuned]):
        # The judge may be watched, too, under its own name.
        is_judge = key not in ("accuracy", "reward") and all(row.get(key) == row["accuracy"] for row in (base, tuned))
        if not is_judge and None not in (base.get(key), tuned.get(key)):
            figures.append({"key": key, "name": describe_figure(key)} | compare(key, (base, tuned), results))
    facts = {key: tuned[key] for key in ("prompts", "sampler", "checkpoint", "lora", "n_images")}
    facts |= {"title": set_title(tuned["prompts"]), "settings": describe_sampler(tuned)}
    facts |= {"n_prompts": min(tuned["n_prompts"], tuned["n_images"])}
    return facts | {"figures": figures, "rows": [base, tuned]} if figures else None


def read_result(root: Path, row: Row) -> dict[str, Any] | None:
    """An evaluation's result.json with the values of single images; None if it is not there any more, or damaged."""
    with suppress(OSError, ValueError):
        return files.read_object(root / row["folder"] / "result.json")
    return None


def compare(key: str, rows: Sequence[Row], results: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """`base`, `tuned` and `change` of one figure, and whether the change is `significant`.

    Without the values of single images the intervals follow from the rows' standard errors.
    """
    if None in results:
        base, tuned = (from_row(row, key) for row in rows)
        gain = from_row(rows[1], f"{key}_gain")
    else:
        before, after = (values_of(result, key) for result in results)
        base, tuned = (interval(list(one.values()), [prompt for prompt, _ in one]) for one in (before, after))
        shared = [image for image in after if image in before]
        gain = change([after[one] for one in shared], [before[one] for one in shared], [prompt for prompt, _ in shared])
    found = {name: as_json(one) for name, one in (("base", base), ("tuned", tuned), ("change", gain))}
    return found | {"significant": gain is not None and gain.is_significant}


def values_of(result: Mapping[str, Any], key: str) -> dict[tuple[str, int], float | None]:
    """{(prompt, number): value} of a figure: for each image, or of a diversity for each prompt."""
    if key.startswith("diversity/"):
        features, _, measure = key.removeprefix("diversity/").partition("_")
        return {(prompt, 0): value for prompt, value in result["diversity"][features][measure or "all"].items()}
    return {
        (prompt, n): value
        for n, (prompt, value) in enumerate(zip(result["shown_prompts"], result["values"][key], strict=True))
    }


def from_row(row: Row, key: str) -> Interval | None:
    """A figure's interval from its standard error."""
    mean, error = row.get(key), row.get(f"{key}_se")
    if mean is None:
        return None
    half = None if error is None else NORMAL * error
    ends = (None, None) if half is None else (mean - half, mean + half)
    return Interval(mean, *ends, error, row["n_images"], row["n_images"], over_prompts=False)


def as_json(found: Interval | None) -> dict[str, float | None] | None:
    return found and {"mean": found.mean, "low": found.low, "high": found.high}


def outcome(figure: Mapping[str, Any]) -> str:
    """What a figure has done, in words."""
    if not figure["significant"]:
        return NO_CHANGE
    return "risen" if figure["change"]["mean"] > 0 else "fallen"


def hacking_signs(root: Path, signs: Sequence[Row], stage: int) -> list[Row]:
    """The signs of reward hacking of a stage: of its evaluations, and of its scores and those of the stage after it.

    `signs` are those of all evaluations. What a stage has learnt shows in the images of the next one.
    """
    near = [one for one in (Stage(root, stage), Stage(root, stage + 1)) if one.finished("select")]
    scored = [row for one in near for row in stage_warnings(one) if row["kind"] in ADVICE]
    return [*(row for row in signs if row["stage"] == stage), *scored]


def signs_of_evaluations(root: Path, rows: Sequence[Row]) -> list[Row]:
    """Every sign of reward hacking in the evaluations `rows`, by stage, in the form of `warned_rows`."""
    reward = files.read_json(root / "config.json")["config"]["reward"]
    apart = reward_weights(reward) if reward.get("combine", "sum") == "advantages" else {}
    signs = evaluation_warnings(rows, apart, reward.get("weights") or ())
    return sorted(signs, key=lambda row: (row["stage"], in_order(row)))


def made_files(root: Path, record: Mapping[str, Any], lora: str) -> dict[str, str]:
    """Paths of what the run has made."""
    log = log_of(Path(record["config"]["log_path"]), root)
    return {"LoRA": str((root / lora).parent), "report": str(root / "report.html"), "log": str(log)}


# ---- what to do next ----


def what_next(root: Path, record: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """{what: command or words}, at most three."""
    first = found["tables"][0]
    result = read_result(root, first["rows"][1])
    prompt = shlex.quote(result["shown_prompts"][0]) if result else "PROMPT"
    name = root.name if root.parent == EXPERIMENTS else str(root)
    judge = shlex.join(judging_command(root, record, as_judged(first["rows"][1], record["config"]["eval"])))
    draw = {"Draw a prompt": f"{judge} --prompt {prompt}"}
    if found["hacking"] or found["hacked_before"]:
        # Without a judge the best would be that of the highest reward, which is the one that measures the wrong thing.
        best = {"Find a better checkpoint": f"{judge} --best"}
        return draw | (best if found["judge"] else {"Compare the checkpoints": f"{judge} --all"})
    if found["stage"] + 1 < found["num_stages"]:
        return draw | {"Go on": "the same command again"}
    more = {"Go on": f"the same command with StageCnt={2 * found['num_stages']}, in Python stages={2 * found['num_stages']}"}
    if "risen" not in main_outcomes(found).values():
        tries = "judge more images (eval.num_images), or take a new ExpName with a higher LR or BatchCnt"
        return draw | more | {"Or": tries}
    return draw | {"Export the LoRA": f"{command('export')} {shlex.quote(name)}"} | more


def as_judged(row: Row, begun: Mapping[str, Any]) -> dict[str, Any]:
    """How a row was judged, where that is not as the experiment was begun: so what has been judged is not judged again."""
    was = {"num_images": row["n_images"], "batch_size": row.get("batch_size"), "seed": row.get("seed")}
    return {f"eval.{key}": value for key, value in was.items() if value not in (None, begun.get(key))}
